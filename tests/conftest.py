import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing downloads anything
torch.set_num_threads(1)  # two threads on two busy cores are many times slower than one

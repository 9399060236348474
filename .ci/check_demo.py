"""Assert what a shortened demo must show: `check_demo.py SUMMARY`, the JSON that `accvideo demo --json` printed."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
rows = {row["name"]: row for row in summary["report"]["rows"]}
teacher, equal, student = rows["teacher"], rows["teacher_equal_calls"], rows["student"]


def metric(row: dict, name: str) -> float:
    """Mean of a metric of a row."""
    return row["metrics"][name]["mean"]


checks = {
    "the teacher takes 100 calls, the student 5": (teacher["denoiser_calls"], student["denoiser_calls"]) == (100, 5),
    "the student is nearer the teacher's videos than the teacher at 5 calls": (
        metric(student, "latent_mse") < metric(equal, "latent_mse")
    ),
    "the student follows more prompts than the teacher at 5 calls": (
        metric(student, "all_right") > metric(equal, "all_right")
    ),
    "the student is at least 6 times as fast end to end": summary["report"]["speedup"]["end_to_end"] > 6,
    "the page is there": Path(summary["page"]).stat().st_size > 100_000,
}
for name, holds in checks.items():
    print(f"{'ok' if holds else 'FAILED'}: {name}")
sys.exit(0 if all(checks.values()) else 1)

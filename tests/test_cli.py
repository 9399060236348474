import json
import subprocess
import sys
from pathlib import Path

import pytest

from accvideo import cli
from accvideo.playground import world


def test_help_needs_no_torch():
    """Help comes at once because nothing heavy is imported for it."""
    program = "import sys; from accvideo import cli; assert cli.run(['--help']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_options_and_data_commands_need_no_diffusers():
    """It takes seconds to import: what goes wrong before a network is needed must not wait for it."""
    data = ("prompts", "verify", "stats", "merge", "pack", "unpack", "playground prompts")
    program = "import sys; from accvideo import cli\n"
    program += f"for command in {[*cli.CONFIGS, *data]}: assert cli.run([*command.split(), '--help']) == 0, command\n"
    program += "assert cli.run(['verify', 'missing']) == 1\n"
    program += "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run([*command.split(), "--help"]) == 0
    assert f"accvideo {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["foo"], ["playground"], ["record"], ["verify", "x", "--no-such-option"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]):
    assert cli.run(arguments) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["record", "playground", "--prompts", "missing.txt", "--out", "data"],
        ["record", "playground", "--prompts", "prompts.txt", "--out", "data", "--num-student-steps", "7"],
        ["record", "nowhere/at-all/pipeline", "--prompts", "prompts.txt", "--out", "data"],
        ["distill", "missing", "--out", "student"],
        ["distill", "missing", "--out", "student", "--preset", "papers"],
        ["generate", "missing", "--prompt", "a star", "--out", "star.mp4"],
        ["generate", "playground", "--prompt", "a star", "--out", "star.txt"],
        ["evaluate", "missing", "--out", "report"],
    ],
)
def test_a_mistake_is_explained_in_two_lines_and_exits_with_1(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star spins on a plain navy background\n")
    assert cli.run(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert 1 <= len(output.err.strip().splitlines()) <= 2
    assert output.err.startswith("accvideo: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


def test_json_is_one_object_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "prompts.txt"
    assert cli.run(["playground", "prompts", "--num", "5", "--split", "held_out", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompts": str(out), "num_prompts": 5}
    prompts = out.read_text().splitlines()
    assert len(set(prompts)) == 5
    assert world.parse_captions(prompts).held_out().all()


def test_verify_names_problems_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["verify", str(tmp_path), "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["num_problems"] == 1
    assert str(tmp_path) in output.err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(command: str, arguments: list[str]):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", interrupt)
    assert cli.run(["demo"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_presets_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from accvideo import distill
    from accvideo.training import recipe

    seen = []
    monkeypatch.setattr(distill, "distill", lambda config: seen.append(config) or {})
    for arguments in (["--preset", "paper"], ["--preset=paper", "--batch-size", "4"], []):
        assert cli.run(["distill", "data", "--out", str(tmp_path), *arguments]) == 0
    paper, smaller, default = seen
    assert paper == recipe.paper("data", tmp_path)
    assert (smaller.batch_size, smaller.update) == (4, "alternating")
    assert default == recipe.DistillConfig(data="data", out=tmp_path)


@pytest.mark.parametrize("command", ["record", "distill"])
def test_help_lists_the_presets_and_shows_the_values_of_the_one_chosen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.run([command, "--help", "--preset", "wan21-t2v-14b"]) == 0
    shown = capsys.readouterr().out
    assert "--preset {default," in shown and "hunyuan-544p" in shown
    assert {"record": "(default: 832)", "distill": "(default: 5e-06)"}[command] in shown


def test_a_demo_without_trajectories_to_train_on_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["demo", "--num-trajectories", "16", "--out", str(tmp_path / "demo")]) == 1
    assert "16 are held out" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()

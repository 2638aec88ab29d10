"""configurator.py: defaults, config files, the command line, and one-line messages for every mistake."""
import os
import re
import subprocess
import sys

import pytest

import configurator
import train
from configurator import ROOT, configure

STAGES = dict(stage1=dict(steps=10, learning_rate=1e-3, train="new"), stage2=dict(steps=20, learning_rate=1e-3))
DEFAULTS = dict(steps=100, learning_rate=3e-4, compile=False, out_dir="", text=[], stages=STAGES)


def fails(argv, *parts):
    """Check that configure() ends with one line that holds all the parts."""
    with pytest.raises(SystemExit) as error:
        configure(DEFAULTS, [str(arg) for arg in argv])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "fast.v2.py", '"""A docstring."""\nlearning_rate = 10 * 3e-4\nsteps = 9\ntext = dict(a=1)\n')
    config, name = configure(DEFAULTS, ["--steps=7", str(path), "--text=['b']"])
    assert name == "fast.v2" and list(config) == list(DEFAULTS)
    assert config == DEFAULTS | dict(learning_rate=10 * 3e-4, steps=7, text=["b"])
    assert configure(DEFAULTS, []) == (DEFAULTS, "default")


def test_values_in_a_file(tmp_path):
    """Arithmetic, names assigned above, nested values; and an override changes one of two stages that share a dict."""
    path = write(tmp_path, "a.py", """
_tokens = 2**20
steps = _tokens // (12 * 256)
learning_rate = steps / 2 - -1
compile = True
out_dir = "out/" + "a"
text = {"data/a": 0.7, "data/b": 0.3}
_stage = dict(steps=steps, mixture={"text": 1, "speech": [1, (2, 3)]})
stages = dict(stage1=_stage, stage2=_stage)
""")
    config, _ = configure(DEFAULTS, [str(path), "--stages.stage1.mixture.text=5", "--stages.stage1.steps=6"])
    assert config == dict(
        steps=341, learning_rate=171.5, compile=True, out_dir="out/a", text={"data/a": 0.7, "data/b": 0.3},
        stages=dict(stage1=dict(steps=6, mixture=dict(text=5, speech=[1, (2, 3)])),
                    stage2=dict(steps=341, mixture=dict(text=1, speech=[1, (2, 3)]))))


def test_a_base_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, "ROOT", tmp_path)
    write(tmp_path, "config/grand.py", "steps = 1\nlearning_rate = 1\nout_dir = 'g'")  # found in ROOT/config
    write(tmp_path, "config/base.py", "base = 'nothing.py'")  # not used: mine.py's own folder has a base.py
    write(tmp_path, "base.py", "steps = 2\nbase = 'grand.py'\nlearning_rate = 2\n_a = 1")
    write(tmp_path, "mine.py", "steps = 3\nbase = 'base.py'")
    monkeypatch.chdir(tmp_path / "config")
    config, name = configure(DEFAULTS, ["mine.py"])
    assert (config["steps"], config["learning_rate"], config["out_dir"], name) == (3, 2.0, "g", "mine")
    fails(["grnd.py"], "grnd.py: no such config file; did you mean grand.py?")
    write(tmp_path, "grand.py", "base = 'mine.py'")
    fails(["mine.py"], "mine.py: starts from itself")


@pytest.mark.parametrize("arg, value", [
    ("learning_rate=1", 1.0), ("learning_rate=3*1e-4", 3 * 1e-4), ("steps= 1e6", 10**6), ("compile=Yes", True),
    ("resume=0", False), ("out_dir=123", "123"), ("out_dir=a=b", "a=b"), ("text=('a',)", ["a"]),
    ("text={'a': 0.5}", {"a": 0.5}), ("stages=dict(x=dict(steps=1))", dict(x=dict(steps=1)))])
def test_overrides_take_the_type_of_the_default(arg, value):
    defaults = DEFAULTS | dict(resume=True)
    config, _ = configure(defaults, [f"--{arg}"])
    key = arg.split("=")[0]
    assert config == defaults | {key: value} and type(config[key]) is type(value)


@pytest.mark.parametrize("arg, message", [
    ("--stages.stage1.stps=1", "no setting stages.stage1.stps; did you mean stages.stage1.steps?"),
    ("--stages.stage1.steps.x=1", "stages.stage1.steps is 10, which has nothing inside; write --stages.stage1.steps="),
    ("--stages.stage1.steps=x", "--stages.stage1.steps=x is 'x', of type str; give a value of type int, like 10"),
    ("--compile", "--compile has no value; write --compile=value"),
    ("--steps=1.5", "is 1.5, of type float; give a value of type int, like 100"),
    ("--steps=1e999", "give a value of type int"),
    ("--compile=2", "give true or false"),
    ("b.py", "second config file")])
def test_wrong_command_lines(tmp_path, arg, message):
    fails([write(tmp_path, "a.py", ""), arg], "command line: ", message)


@pytest.mark.parametrize("text, message", [
    ("import os", "does not belong in a config file; write lines of name = value"),
    ("steps = open(1)", "name 'open' is not defined; write numbers"),
    ("steps = learning_rate", "'learning_rate' is not defined"),
    ("lerning_rate = 1", "no setting lerning_rate; did you mean learning_rate?"),
    ("out_dir = 3", "is 3, of type int; give a value of type str")])
def test_mistakes_in_a_file_name_the_line(tmp_path, text, message):
    path = write(tmp_path, "a.py", "\n" + text)
    fails([path], f"{path}:2: {text}", message)
    fails([write(tmp_path, "a.py", "\nsteps = = 3")], "a.py", "line 2", "is not Python")


def test_help_shows_every_setting_with_its_comment(tmp_path):
    script = write(tmp_path, "script.py", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
steps = 100          # of the optimizer
text = ["a#b"]
configure(dict(steps=steps, text=text), sys.argv[1:])
raise SystemExit(3)
""")
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--text=['a#b']" in done.stdout
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if "--steps" in line] == ["of the optimizer"]


def test_every_path_that_an_error_suggests_is_found(tmp_path, monkeypatch):
    """base = "config/train_tiny.py" in a file outside config/ led to an error that suggested just that."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine.py", "base = 'train_tinny.py'")
    with pytest.raises(SystemExit) as error:
        configure(train.DEFAULTS, ["mine.py"])
    suggested = re.search(r"did you mean (.*)\?", str(error.value))[1]
    for base in (suggested, "train_tiny.py", "config/train_tiny.py"):
        write(tmp_path, "mine.py", f"base = {base!r}")
        assert configure(train.DEFAULTS, ["mine.py"])[0]["hidden_size"] == 96


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_shows_what_it_can(encoding):
    code = "from configurator import configure; configure({}, []); print('71 ± 2, Ø 漢')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 0 and done.stdout == "71 ± 2, Ø 漢\n".encode(encoding, "replace")

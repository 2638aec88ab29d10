import keyword
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import ROOT, configure, nearest

DEFAULTS = dict(
    steps=100, learning_rate=3e-4, compile=False, out_dir="", text=[],
    stages=dict(stage1=dict(steps=10, learning_rate=1e-3, train="new"), stage2=dict(steps=20, learning_rate=1e-3)))


def fails(argv, *parts, defaults=DEFAULTS):
    """What configure() ends with: one line that holds all the parts."""
    with pytest.raises(SystemExit) as error:
        configure(defaults, [str(arg) for arg in argv])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_arguments_the_defaults_stand_and_stay_untouched():
    config, name = configure(DEFAULTS, [])
    assert (config, name, list(config)) == (DEFAULTS, "default", list(DEFAULTS))
    config["stages"]["stage1"]["steps"] = 0
    config["text"].append("x")
    assert DEFAULTS["stages"]["stage1"]["steps"] == 10 and DEFAULTS["text"] == []


def test_file_over_defaults_and_line_over_file(tmp_path):
    text = '"""What it is for."""\nlearning_rate = 10 * 3e-4  # ten times\nsteps = 2**20\n'
    path = write(tmp_path, "fast.run.py", text)
    config, name = configure(DEFAULTS, ["--steps=7", str(path)])
    assert name == "fast.run" and list(config) == list(DEFAULTS)
    assert config == DEFAULTS | dict(learning_rate=10 * 3e-4, steps=7)


def test_what_a_file_may_say(tmp_path):
    path = write(tmp_path, "a.py", """
_tokens = 2**20
steps = _tokens // (12 * 256)
learning_rate = steps / 2 - -1
compile = True
out_dir = "out/" + "a"
text = {"data/a": 0.7, "data/b": 0.3}
stages = dict(stage2=dict(steps=steps, mixture={"text": 1, "speech": [1, (2, 3)]}))
""")
    config, _ = configure(DEFAULTS, [str(path)])
    assert config == dict(
        steps=341, learning_rate=171.5, compile=True, out_dir="out/a", text={"data/a": 0.7, "data/b": 0.3},
        stages=dict(stage2=dict(steps=341, mixture=dict(text=1, speech=[1, (2, 3)]))))


def test_a_file_is_never_run(tmp_path):
    for text in ("import os", "steps = open('x')", "steps = [i for i in 'a'][0]", "steps = __import__('os').getpid()",
                 "steps = None", "def f(): pass", "steps += 1", "a, steps = 1, 2", "steps = learning_rate",
                 "steps = 1 if True else 2", "stages = dict(**{'a': 1})", "stages = {**{}}", "steps = 1 / 0",
                 "steps = 'a' - 1"):
        path = write(tmp_path, "evil.py", "\n" + text)
        fails([path], f"{path}:2: ", "write ")
    path = write(tmp_path, "evil.py", "steps = = 3")
    fails([path], path, "not Python")


def test_a_base_is_beside_its_file_and_comes_first(tmp_path):
    write(tmp_path, "grand.py", "steps = 1\nlearning_rate = 1\nout_dir = 'g'")
    write(tmp_path, "base.py", "steps = 2\nbase = 'grand.py'\nlearning_rate = 2")
    path = write(tmp_path, "mine.py", "steps = 3\nbase = 'base.py'")
    config, name = configure(DEFAULTS, [str(path)])
    assert (config["steps"], config["learning_rate"], config["out_dir"], name) == (3, 2.0, "g", "mine")
    write(tmp_path, "grand.py", "base = 'mine.py'")
    fails([path], "mine.py: starts from itself")
    path = write(tmp_path, "lost.py", "base = 'bsae.py'")
    fails([path], "bsae.py: no such config file", "did you mean", "base.py")
    path = write(tmp_path, "far.py", "base = 'base.py'\nsteps = _a")  # names of the base are not this file's
    fails([path], f"{path}:2", "`_a`")


def test_a_file_is_found_from_here_or_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(["config/train_tny.py"], "config/train_tny.py: no such config file", "train_tiny.py")
    fails(["nowhere/train_tny.py"], "train_tiny.py")
    shipped = ROOT / "config" / "train_tiny.py"
    fails(["config/train_tiny.py"], f"{shipped}:", "no setting", defaults=dict(nothing_of_it=1))
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", "train_tiny.py", "steps = 5")
    assert configure(DEFAULTS, ["config/train_tiny.py"])[0]["steps"] == 5


@pytest.mark.parametrize("arg, key, value", [
    ("--learning_rate=1", "learning_rate", 1.0), ("--learning_rate=3*1e-4", "learning_rate", 3 * 1e-4),
    ("--learning_rate=-2", "learning_rate", -2.0), ("--steps=2**20", "steps", 2**20), ("--steps=1e6", "steps", 10**6),
    ("--compile=true", "compile", True), ("--compile=Yes", "compile", True), ("--compile=1", "compile", True),
    ("--out_dir=123", "out_dir", "123"), ("--out_dir=a=b", "out_dir", "a=b"), ("--out_dir=", "out_dir", ""),
    ("--out_dir=--x y", "out_dir", "--x y"), ("--text=['a', 'b']", "text", ["a", "b"]),
    ("--text=('a',)", "text", ["a"]),
    ("--text={'a': 0.5}", "text", {"a": 0.5}), ("--stages=dict(x=dict(steps=1))", "stages", dict(x=dict(steps=1)))])
def test_values_of_the_line_take_the_type_of_the_default(arg, key, value):
    config, _ = configure(DEFAULTS, [arg])
    assert config == DEFAULTS | {key: value} and type(config[key]) is type(value)


def test_false_in_all_its_spellings():
    for text in ("false", "False", "0", "no"):
        assert configure(dict(compile=True), [f"--compile={text}"])[0]["compile"] is False


def test_dotted_keys_reach_into_dicts():
    config, _ = configure(
        DEFAULTS, ["--stages.stage1.steps=1e1", "--stages.stage1.train=all", "--stages.stage2.learning_rate=1"])
    assert config["stages"] == dict(stage1=dict(steps=10, learning_rate=1e-3, train="all"),
                                    stage2=dict(steps=20, learning_rate=1.0))
    assert DEFAULTS["stages"]["stage1"]["train"] == "new"
    fails(["--stages.stage1.stps=1"], "no setting stages.stage1.stps", "did you mean stages.stage1.steps?")
    fails(["--stages.stge2.steps=1"], "no setting stages.stge2", "did you mean stages.stage2?")
    fails(["--stages.stage1.steps.x=1"], "stages.stage1.steps is 10", "--stages.stage1.steps=value")
    fails(["--stages.stage1.steps=x"], "'x'", "int", "10")
    fails(["--text.a=1"], "text is []")


def test_unknown_keys_name_the_nearest(tmp_path):
    fails(["--learning_rte=1"], "command line", "learning_rte", "did you mean learning_rate?")
    path = write(tmp_path, "a.py", "steps = 1\n\nlerning_rate = 1\n")
    fails([path], f"{path}:3", "lerning_rate", "did you mean learning_rate?")
    assert nearest("xyz", ["steps"]) == "steps"


@pytest.mark.parametrize("key, text", [("steps", "1.5"), ("steps", "'1'"), ("steps", "True"), ("learning_rate", "'a'"),
                                       ("learning_rate", "True"), ("compile", "'x'"), ("compile", "2"), ("text", "'a'"),
                                       ("stages", "[1]"), ("steps", "(-1)**0.5"), ("steps", "1e999")])
def test_wrong_types_name_key_value_type_and_place(tmp_path, key, text):
    path = write(tmp_path, "a.py", f"{key} = {text}")
    wanted = type(DEFAULTS[key]).__name__.replace("bool", "true or false")
    fails([path], f"{path}:1", key, wanted, repr(DEFAULTS[key]))
    fails([f"--{key}={text}"], "command line", f"--{key}={text}", wanted)


def test_a_number_is_no_text_in_a_file(tmp_path):
    fails([write(tmp_path, "a.py", "out_dir = 3")], "out_dir = 3", "str")


def test_lines_that_are_not_key_value():
    fails(["--compile"], "--compile has no value", "--compile=value")
    fails(["--steps", "5"], "no value" if (ROOT / "5").exists() else "5: no such config file")
    fails(["-x"], "write --x=value")
    fails(["a.py", "b.py"], "second config file")


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
    for flag in ("-h", "--help"):
        done = subprocess.run([sys.executable, str(script), flag], capture_output=True, text=True)
        assert done.returncode == 0 and "--steps=100" in done.stdout and "of the optimizer" in done.stdout
        assert "--text=['a#b']" in done.stdout


numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(st.one_of(st.booleans(), numbers, st.text(st.characters(exclude_categories=["Cs"]))),
                      lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text("ab c"), inner)), max_leaves=6)
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name != "base" and not keyword.iskeyword(name))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(new=st.dictionaries(names, values, min_size=1, max_size=5))
def test_what_is_written_is_what_is_read(new, tmp_path_factory):
    """Any settings, from a file and from the line, over defaults of the same types, come back with value and type."""
    blank = {key: type(value)() for key, value in new.items()}
    text = "\n".join(f"{key} = {value!r}" for key, value in new.items())
    path = write(tmp_path_factory.getbasetemp(), "round.py", text)
    line = [f"--{key}={value if isinstance(value, str) else repr(value)}" for key, value in new.items()]
    for argv in ([str(path)], line):
        config, _ = configure(blank, argv)
        assert repr(config) == repr(new) and list(config) == list(new)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_text_of_a_value_escapes_as_another_error(text):
    for key in DEFAULTS:
        try:
            config, _ = configure(DEFAULTS, [f"--{key}={text}"])
            assert type(config[key]) is type(DEFAULTS[key]) or (key == "text" and isinstance(config[key], dict))
        except SystemExit as error:
            assert key in str(error)


@pytest.mark.parametrize("text", [
    "9**9**9", "2**5000", "(-7)**9999", "[0] * 10**9", "10**9 * 'a'", "'%999999999d' % 1", "(2**4000) * (2**4000)",
    "'a' * 10**5 + 'b' * 10**5", "9**99 * [1]"])
def test_nothing_fills_the_memory(tmp_path, text):
    fails([write(tmp_path, "a.py", f"steps = {text}")], "a.py:1: ", "is too large for a setting")
    fails([f"--steps={text}"], "--steps=", "give a value of type int")


def test_what_is_large_and_fine(tmp_path):
    path = write(tmp_path, "a.py", "text = ['a'] * 9 + 0 * ['b']\nsteps = 2**40 // 3 % 10**9")
    config, _ = configure(DEFAULTS, [str(path)])
    assert config["text"] == ["a"] * 9 and config["steps"] == 2**40 // 3 % 10**9

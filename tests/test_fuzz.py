"""Some thousand mutated files of strangers; tests/fuzz.py says what they are and takes a hundred thousand."""
import pytest

fuzz = pytest.importorskip("fuzz", reason="resource limits: Unix only")
SHARES = fuzz.shares(3000, list(fuzz.BUILD))


@pytest.mark.parametrize("name", fuzz.BUILD)
def test_a_clear_error_or_a_right_result(name):
    try:
        counts, findings = fuzz.fuzz(name, SHARES[name], seed=1)
    except ImportError as error:
        pytest.skip(str(error))
    assert not findings and sum(counts.values()) == SHARES[name]
    assert counts["error"] + counts["right"] > SHARES[name] / 3  # most mutations change what is meant


def broken(kind):
    """A reader that is wrong in a way that a mutation brings out, one trial in two or so."""
    def read(folder):
        raw = (folder / "a.txt").read_bytes()
        if raw != b"seed":
            if kind == "memory":
                bytearray(4 << 30)
            if kind == "hang":
                while True:
                    pass
            if kind == "crash":
                fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGKILL)
            raise {"two lines": ValueError(f"{folder}: a\nb"), "no file": ValueError("what?")}.get(kind, KeyError(kind))
        return raw
    return fuzz.Target([{"a.txt": b"seed"}], read, lambda *_: None, {"txt": [fuzz.flip]})


@pytest.mark.parametrize("kind, what", [
    ("memory", "MemoryError"), ("hang", "took more than 1 s"), ("crash", "process died"), ("exception", "KeyError"),
    ("two lines", "not one line"), ("no file", "does not name the file")])
def test_the_fuzzer_notices(monkeypatch, kind, what):
    monkeypatch.setitem(fuzz.BUILD, "broken", (1, lambda: broken(kind)))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    counts, findings = fuzz.fuzz("broken", 2, seed=1)
    assert counts["finding"] == 2 and all(what in finding for _, _, finding in findings)

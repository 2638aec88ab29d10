"""
Make the shard plan of a large corpus, with its items and bytes but without sound: how long, how much memory?

    python -m tools.simulate                              Libriheavy at its real size: 11 million items in 50,000 hours
    python -m tools.simulate --items=1e5 --shards=8       a small one

It writes a listing with as many lines as the corpus has items. Then it does for one shard what the main process of
corpora/common.py does: it reads the listing, takes its share of the items, and counts the tokens until a part is full.
It prints the seconds and the largest memory of this process, for shards by items and by files, and the parts and files
that the whole corpus becomes. Nothing is heard, aligned or written but the listing.
"""
import gzip
import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from configurator import configure
from corpora import common, libriheavy
from corpora.parts import Bad

DEFAULTS = dict(
    items=11e6,           # items in the corpus: Libriheavy's large subset has about eleven million
    hours=50_000.0,       # hours of sound
    units_a_second=17.2,  # Libriheavy has 3.1 billion units in 50,000 hours (the paper's Table 6)
    tokens_an_hour=6260.0,  # of text: 313 million in 50,000 hours
    files=64,             # files in the listing
    shards=64,            # number of shards
    part_tokens=1 << 26,  # tokens in a part
)
FILES_A_PART = 8  # five arrays, their description, the record of the part, and the dropped items


def write_listing(folder, c):
    """Write the listing in the layout of Libriheavy. Returns its size in bytes."""
    seconds, per_file = c["hours"] * 3600 / c["items"], int(c["items"] // c["files"])
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 2
    for number in tqdm(range(c["files"]), "writing the listing", disable=None):
        with gzip.open(folder / f"libriheavy_cuts_{number:03}.jsonl.gz", "wt", compresslevel=1) as file:
            for i in range(per_file):
                name = f"large/{number}/book_{i // 40000}/chapter_{i // 400:05}"
                cut = dict(id=f"{name}_{i}", start=i % 400 * seconds, duration=seconds, recording=dict(id=name),
                           supervisions=[dict(custom=dict(texts=[text, text.upper()]))])
                file.write(json.dumps(cut) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def plan(folder, shard_by, c):
    """(items, parts, seconds) of the first shard."""
    settings = common.DEFAULTS | dict(audio=str(folder), kind="paired")
    files, began = libriheavy.find(folder, settings), time.perf_counter()
    step = 1 if shard_by == "files" else c["shards"]
    listing = files[::c["shards"]] if shard_by == "files" else files
    with tqdm(desc=f"one shard by {shard_by}", unit="B", unit_scale=True, disable=None) as bar:
        items = itertools.islice(common.read_files(listing, libriheavy.read, settings, bar, set()), 0, None, step)
        n, parts, tokens = 0, 1, 0.0
        for item in items:
            assert not isinstance(item, Bad), item
            n += 1
            tokens += (item.end - item.start) * (c["units_a_second"] + c["tokens_an_hour"] / 3600)
            if tokens >= c["part_tokens"]:
                parts, tokens = parts + 1, 0.0
    return n, parts, time.perf_counter() - began


def main(argv):
    c, _ = configure(DEFAULTS, argv)
    with tempfile.TemporaryDirectory() as folder:
        size = write_listing(Path(folder), c)
        print(f"listing: {c['items']:.0f} items in {c['files']} files, {size / 1e9:.2f} GB")
        for shard_by in ("items", "files"):
            n, parts, seconds = plan(Path(folder), shard_by, c)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"shards by {shard_by}: one of {c['shards']} has {n} items in {parts} parts; reading the listing "
                  f"took {seconds:.0f} s; largest memory {memory:.2f} GB")
    parts = parts * c["shards"]
    print(f"the whole corpus: {parts} folders in --out, {parts * FILES_A_PART} files, {FILES_A_PART} in each")


if __name__ == "__main__":
    main(sys.argv[1:])

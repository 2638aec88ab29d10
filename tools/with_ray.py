"""
Make the shards of a corpus on the machines of a Ray cluster.

    python -m tools.with_ray --shards=64 --cpus=16 --gpus=1 corpora.libriheavy --source=... --out=...

What follows the name of the script are its own settings. A Ray Data pipeline maps each shard number to a run of the
script with --shard=i/n and --workers=CPUS, so the data is the same as without Ray. All machines need this code in the
same folder, and --source and --out on a shared file system. Shards that failed are named at the end; the same command
makes what is missing.
"""
import os
import subprocess
import sys

from configurator import ROOT, configure

DEFAULTS = dict(
    shards=8,     # number of shards; the same for every start
    cpus=4,       # CPUs that a shard takes, and processes that it starts
    gpus=0.0,     # GPUs that a shard takes; it may be a fraction
    address="",   # of the cluster; empty: the one that this machine belongs to, or a new one on it alone
)


def make_shard(command, number, shards):
    """Run one shard. Returns {number, message}: the end of what the script printed, or "" if it ended well."""
    done = subprocess.run([*command, f"--shard={number}/{shards}"], cwd=ROOT, capture_output=True, text=True)
    return dict(number=number, message=(done.stderr or done.stdout)[-500:] if done.returncode else "")


def main(argv):
    scripts = [i for i, arg in enumerate(argv) if not arg.startswith("-")]
    if not scripts or not argv[scripts[0]].startswith("corpora."):
        configure(DEFAULTS, [arg for arg in argv if arg in ("-h", "--help")])
        raise SystemExit("name a script after the settings: python -m tools.with_ray --shards=64 corpora.text ...")
    c, _ = configure(DEFAULTS, argv[:scripts[0]])
    try:
        import ray
        import ray.data
    except ImportError:
        raise SystemExit("ray is missing: pip install 'ray[data]'") from None
    command = [sys.executable, "-m", *argv[scripts[0]:], f"--workers={c['cpus']}"]
    ray.init(address=c["address"] or os.environ.get("RAY_ADDRESS"), ignore_reinit_error=True)
    shards = ray.data.range(c["shards"], override_num_blocks=c["shards"])  # one block, and so one task, for each
    made = shards.map(lambda row: make_shard(command, row["id"], c["shards"]), num_cpus=c["cpus"], num_gpus=c["gpus"])
    failed = []
    for row in made.iter_rows():
        print(f"shard {row['number']}: {row['message'] or 'done'}", flush=True)
        failed += [int(row["number"])] if row["message"] else []
    if failed:
        raise SystemExit(f"{len(failed)} of {c['shards']} shards failed: {sorted(failed)}; the same command makes them")


if __name__ == "__main__":
    main(sys.argv[1:])

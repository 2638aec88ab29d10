"""Statistics and tables: means, standard errors, significance tests, and the paper's Table 7 with our model in it."""
from pathlib import Path

import numpy as np

from runtime.files import read_array, read_json

TABLE_7 = Path(__file__).resolve().parent.parent / "assets/table7.csv"
SETTINGS = ("T", "S", "T->S", "S->T")  # modality of the context -> modality of the ending
OTHER_MEASURE = {"sum": "mean", "mean": "sum"}


# ---------------------------------------------------------------------------------------------------------------------
# right or wrong

def best_is(scores, answer, ties="share"):
    """float64 [n]: 1 if candidate `answer` has the highest score, 0 if another candidate has it.

    scores   [n, candidates]
    answer   an index, or one for each row
    ties     if k > 1 candidates have the highest score: "share" (1/k if the answer is one of them), "wrong" (0),
             "first" (the first of them is chosen)
    """
    answer = np.broadcast_to(answer, len(scores))
    best = scores == scores.max(1, keepdims=True)  # [n, candidates]
    if ties == "first":
        return (best.argmax(1) == answer).astype(float)
    among_best, n_best = best[np.arange(len(best)), answer], best.sum(1)
    return among_best / n_best if ties == "share" else (among_best & (n_best == 1)).astype(float)


def right_by(total, count, ties="share"):
    """{"sum", "mean": float64 [n]}: is the first of two candidates better by summed and by mean log-likelihood?

    total, count: summed log-likelihoods and numbers of scored tokens of the candidates, [2 * n]
    """
    means = total / np.maximum(count, 1)
    return {"sum": best_is(total.reshape(-1, 2), 0, ties), "mean": best_is(means.reshape(-1, 2), 0, ties)}


# ---------------------------------------------------------------------------------------------------------------------
# means and standard errors

def cloze_sums(right):
    """{setting: (sum, sum of squares, number)} of {setting: answers}. They can be added up over processes."""
    return {name: (answers.sum(), (answers ** 2).sum(), len(answers)) for name, answers in right.items()}


def cloze_table(sums):
    """{setting: {accuracy and its standard error in percent, items}} from {setting: (sum, sum of squares, number)}."""
    rows = {}
    for name, (total, squares, n) in sums.items():
        variance = max(0.0, squares / n - (total / n) ** 2)
        rows[name] = dict(accuracy=100 * total / n, stderr=100 * (variance / n) ** 0.5, items=int(n))
    return rows


def accuracy(right):
    """{accuracy and its standard error in percent, items} of answers between 0 and 1, float64 [n]."""
    return cloze_table(cloze_sums({"": right}))[""]


def by_group(right, groups):
    """{group: accuracy of its items}, in alphabetical order."""
    groups = np.asarray(groups)
    return {str(group): accuracy(right[groups == group]) for group in np.unique(groups)}


def over_groups(right, groups):
    """{accuracy, stderr, items, groups}: the unweighted mean over groups. For stderr, only items are random."""
    rows = by_group(right, groups).values()
    mean = float(np.mean([row["accuracy"] for row in rows]))
    stderr = float(np.sum([row["stderr"] ** 2 for row in rows]) ** 0.5 / len(rows))
    return dict(accuracy=mean, stderr=stderr, items=len(right), groups=len(rows))


def nll_table(sums):
    """{kind: {text: nats per token, speech: nats per unit}} from evaluate.heldout_nll's sums."""
    table = {}
    for kind, (text, speech, n_text, n_speech) in sums.items():
        found = dict(text=(text, n_text), speech=(speech, n_speech))
        table[kind] = {stream: float(total / n) for stream, (total, n) in found.items() if n}
    return table


# ---------------------------------------------------------------------------------------------------------------------
# do two checkpoints differ?

def compare(ours, theirs, seed=1, resamples=10_000):
    """Do two models differ on the same items? ours, theirs: float64 [items] -> {difference, p (two-sided), test, ...}.

    If every item is right or wrong, this is the exact McNemar test: a binomial test on the items that only one model
    has right. Other scores (ties, means over voices, NLLs) are tested by a bootstrap over items: the differences are
    shifted to mean 0, which is the null hypothesis, and resampled.
    """
    difference = ours - theirs
    mean, n = float(difference.mean()), len(difference)
    if np.isin([ours, theirs], (0, 1)).all():
        from scipy.stats import binomtest  # here, because it takes a second to import

        only_first, only_second = int((difference > 0).sum()), int((difference < 0).sum())
        discordant = only_first + only_second
        p = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
        return dict(difference=mean, p=p, test="McNemar", only_first=only_first, only_second=only_second)
    # Drawing n items with replacement is the same as drawing how often each value occurs.
    values, counts = np.unique(difference - difference.mean(), return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.array([rng.multinomial(n, counts / n) @ values / n for _ in range(resamples)])
    extreme = int((abs(means) >= abs(mean) - 1e-12).sum())
    return dict(difference=mean, p=(extreme + 1) / (resamples + 1), test="bootstrap", resamples=resamples)


def item_path(path, task, name):
    """The .npy file of one array of items that belongs to an evaluation.json."""
    return Path(path).with_suffix(".items") / f"{task}.{name.replace('->', '-to-')}.npy"


def compare_results(first, second):
    """{task.setting: comparison} of two evaluation.json files, for the tasks that both scored.

    Differences are in percentage points for answers and in nats per token for NLLs. ValueError if the two did not score
    the same items in the same way.
    """
    ours, theirs = (read_json(path).get("made") for path in (first, second))
    if not isinstance(theirs, dict):
        raise ValueError(f"{second}: no results of evaluate.py; give its evaluation.json or a checkpoint")
    comparisons = {}
    for task in [task for task in ours if task in theirs]:
        for key in ("protocol", "files"):
            if ours[task][key] != theirs[task].get(key):
                raise ValueError(f"{second}: {task} has other {key} than {first}; score both the same way")
        for name in ours[task]["items"]:
            if name not in theirs[task]["items"] or not (name.endswith("right") or name == "nll"):
                continue
            a, b = (np.array(read_array(item_path(path, task, name))) for path in (first, second))
            if a.shape != b.shape:
                raise ValueError(f"{item_path(second, task, name)}: {b.shape} items, not {a.shape}")
            if name == "nll":  # of whole documents
                tokens = read_array(item_path(first, task, "tokens")).mean()
                found = compare(a / tokens, b / tokens)
            else:
                found = compare(a, b)
                found["difference"] *= 100
            comparisons[f"{task}.{name}".rpartition(".")[0]] = found
    return comparisons


# ---------------------------------------------------------------------------------------------------------------------
# tables

def table_7_row(results):
    """Our row of Table 7, as strings; "" if not scored."""
    def percent(*keys):
        value = results
        for key in keys:
            value = (value or {}).get(key)
        return "" if value is None else f"{value:.1f}"

    size, tokens = results["parameters"], results.get("tokens")
    stories = [percent(task, setting, "accuracy") for task in ("tstorycloze", "sstorycloze") for setting in SETTINGS]
    mmlu = [percent(task, "acc_norm", "accuracy") for task in ("mmlu", "before")]
    return [results["checkpoint"], f"{size / 1e6:.3g}M" if size < 1e9 else f"{size / 1e9:.3g}B",
            f"{tokens / 1e9:.3g}B" if tokens else "", percent("blimp", "accuracy"),
            percent("sblimp", "dev", "accuracy"), *stories, " / ".join(filter(None, mmlu))]


def score_rows(results):
    """[name, score, number of items, protocol] of every accuracy, and of every NLL except those of random windows."""
    rows = []
    for task, made in results["made"].items():
        scores, protocol = results[task], dict(made["protocol"])
        if "stderr" in scores:  # the task has one score only
            scores = {"": scores}
        protocol |= {key: value for key, value in made.get("notes", {}).items() if key in protocol}
        options = ", ".join(f"{key}={value}" for key, value in protocol.items())
        for name, row in scores.items():
            if not isinstance(row, dict) or "stderr" not in row:
                continue
            if "nll" in row:
                value, number = f"{row['nll']:.3f}", f"{row['documents']} documents"
            else:
                value, number = f"{row['accuracy']:.2f}", f"{row['items']} items"
            rows.append([f"{task} {name}".strip(), f"{value} ± {row['stderr']:.2g}", number, options])
    return rows


def markdown_table(header, *rows):
    """The lines of a table. Empty cells get a dash."""
    lines = [[cell or "–" for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def as_markdown(results):
    """Table 7 with our row, all other scores below it, and the comparison with another checkpoint if there is one."""
    paper = [line.split(";") for line in TABLE_7.read_text(encoding="utf-8").splitlines()]
    ours = [f"**{cell}**" if cell else "" for cell in table_7_row(results)]
    lines = ["Table 7 of the paper, and this checkpoint. Ø: it lacks the modality; –: not reported, or not scored.", "",
             *markdown_table(*paper, ours)]
    if rows := score_rows(results):
        lines += markdown_table(["score", "% right, or nats per token, ± standard error", "of", "protocol"], *rows)
    if versus := results.get("versus"):
        rows = [[name, f"{test['difference']:+.3f}", f"{test['p']:.2g}", test["test"]]
                for name, test in versus["scores"].items()]
        lines += [f"Against {versus['checkpoint']}:", "",
                  *markdown_table(["score", "difference (%, nats)", "p", "test"], *rows)]
    return "\n".join(lines)


def as_text(results):
    """The results as small tables for the terminal."""
    lines = []
    if results.get("nll"):
        lines.append("held-out NLL         text, nats/token   speech, nats/unit")
        for kind, nll in results["nll"].items():
            cells = [f"{nll[stream]:20.3f}" if stream in nll else " " * 20 for stream in ("text", "speech")]
            lines.append(f"  {kind:12}" + "".join(cells))
    if cloze := results.get("topic_cloze"):
        items = next(iter(cloze.values()))["items"]
        title = f"Topic-Cloze, % of {items} items"
        lines.append(title + "".join(f"{setting:>14}" for setting in cloze))
        cells = [f"{cell['accuracy']:7.1f} ± {cell['stderr']:<4.1f}" for cell in cloze.values()]
        lines.append(" " * len(title) + "".join(cells))
    for name, score, items, _ in score_rows(results) if "made" in results else ():
        if not name.startswith("topic_cloze"):
            lines.append(f"{name:20}{score:>16}   {items}")
    if versus := results.get("versus"):
        for name, test in versus["scores"].items():
            lines.append(f"{name:20}{test['difference']:+16.3f}   p = {test['p']:.2g} ({test['test']}) against"
                         f" {versus['checkpoint']}")
    return "\n".join(lines)

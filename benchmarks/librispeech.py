"""Negative log-likelihood of whole documents, each scored separately: LibriSpeech's speech, or any text."""
import numpy as np

from data import open_source


def overlapping_windows(n, limit):
    """[(start, first scored, end)]: windows of at most `limit` inputs over n tokens that score tokens 1..n-1 once each.

    The first window scores all its tokens but the first. Later windows overlap by half, so that at least half a window
    comes before each token they score.
    """
    windows, done = [], 1
    while done < n:
        end = min(n, limit + 1 if done == 1 else done + max(1, limit // 2))
        windows.append((max(0, end - limit - 1), done, end))
        done = end
    return windows


def score(evaluator, sets, protocol, stream):
    """({nll, stderr, tokens, documents, perplexity}, arrays) of one stream of data sets, "speech" or "text".

    nll is in nats per unit or per token. stderr is over documents. The EOS at the end of a document is not scored.
    """
    config = evaluator.model.config
    eos, first_id = (config.speech_eos, config.vocab_size) if stream == "speech" else (config.eos_token_id, 0)
    sequences, spans, owner, n_documents = [], [], [], 0  # owner: the document of a sequence
    for shard in open_source(stream, sets, *evaluator.made_with).shards:
        tokens, bounds = getattr(shard, stream), shard.documents
        if shard.meta["kind"] == "paired":  # its documents are counted in words
            bounds = getattr(shard, f"{stream}_words")[bounds]
        for begin, end_of_document in zip(bounds, bounds[1:]):
            ids = [eos, *(tokens[begin:end_of_document - 1].astype(np.int64) + first_id).tolist()]
            for start, first, end in overlapping_windows(len(ids), config.max_position_embeddings):
                sequences.append(ids[start:end])
                spans.append((first - start, end - start))
                owner.append(n_documents)
            n_documents += 1
        evaluator.used.append(shard.folder / f"{stream}.npy")
    total, count = evaluator.log_likelihood(sequences, spans)

    nll, tokens = (np.bincount(owner, values, n_documents) for values in (-total, count))  # [documents]
    mean = nll.sum() / tokens.sum()
    stderr = np.sqrt(((nll - mean * tokens) ** 2).sum()) / tokens.sum()
    result = dict(nll=mean, stderr=stderr, tokens=int(tokens.sum()), documents=n_documents,
                  perplexity=float(np.exp(mean)))
    return result, dict(nll=nll, tokens=tokens)

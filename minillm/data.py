import torch
import numpy as np

IGNORE = -100      # the target of a position that does not count, torch's default ignore_index


class Rows:
    """Batches of whole documents, one a row, filled up at the right with targets of IGNORE.

    documents: lists of token ids, each with its own start and end token. rows[i] -> inputs, targets, int64 (b, t): batch i of an
    endless sequence that goes through all documents, in another order each epoch, and depends on the seed only, so that i
    is all there is to know to resume. Documents of like length share a batch, so that little is filled up.
    """

    def __init__(self, documents, batch_size, seed=0):
        if len(documents) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {len(documents)} documents")
        self.documents, self.batch_size, self.seed, self.epoch = documents, batch_size, seed, None

    def plan(self, epoch):
        """The batches of an epoch: shuffle, sort by length within pools of 32 batches, cut, shuffle the batches."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order, size = rng.permutation(len(self.documents)), self.batch_size
            pools = [order[i:i + 32 * size] for i in range(0, len(order), 32 * size)]
            pools = [sorted(pool, key=lambda j: len(self.documents[j])) for pool in pools]
            batches = [pool[i:i + size] for pool in pools for i in range(0, len(pool) - size + 1, size)]
            self.epoch, self.batches = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return self.batches

    def __getitem__(self, i):
        n = len(self.plan(self.epoch or 0))
        rows = [self.documents[j] for j in self.plan(i // n)[i % n]]
        ids = torch.full((len(rows), max(map(len, rows))), IGNORE)
        for row, document in zip(ids, rows):
            row[:len(document)] = torch.tensor(document)
        return ids[:, :-1].clamp(min=0), ids[:, 1:]


class Windows:
    """Batches of random windows of one long array of token ids (a memmap, where it is larger than memory).

    windows[i] -> inputs, targets, int64 (batch_size, length); depends on the seed and i only.
    """

    def __init__(self, ids, batch_size, length, seed=0):
        if len(ids) <= length:
            raise ValueError(f"a window of {length} tokens needs more than the {len(ids)} tokens there are")
        self.ids, self.batch_size, self.length, self.seed = ids, batch_size, length, seed

    def __getitem__(self, i):
        starts = np.random.default_rng((self.seed, i)).integers(0, len(self.ids) - self.length, self.batch_size)
        ids = torch.from_numpy(np.stack([self.ids[s:s + self.length + 1] for s in starts]).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

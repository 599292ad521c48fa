"""A logistic-normal topic model (ProdLDA), as in Pyro's tutorial, on the docstrings of SciPy, and how good its guide is.

    w ~ N(0, I_3),  theta = softmax(w),  x ~ Multinomial(softmax(batch_norm(B theta)))
    q(w|x) = N(encoder(x))

Each document is the docstring of a function of scipy.linalg, scipy.signal or scipy.stats, less examples and references.

    python examples/topics.py                       # writes runs/topics
    python examples/topics.py runs/affine affine    # the encoder's batch norms may scale and shift

What the audit says: `encoder falls short`, a gap of 4.9 nats in the median of 30 held-out documents, 4.6 of it amortization,
the guide 1.4 times too wide: a batch norm that may not shift keeps the mean log variance at zero, that of the prior. With
`affine` the gap is 1.0 nats, and log p(x) no better. And `model misfit`: every document is drawn as long as the longest.

Srivastava and Sutton (2017), https://arxiv.org/abs/1703.01488; https://pyro.ai/examples/prodlda.html.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter

import pyro
import pyro.distributions as dist
import scipy.linalg
import scipy.signal
import scipy.stats
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = {"array", "array_like", "bool", "default", "float", "func", "int", "math", "ndarray", "none", "optional", "ref", "str"}
BOILERPLATE = r"\n\s*(?:Examples\n|References\n|Beginning in SciPy|\*\*Array API)"


class Encoder(nn.Module):
    """Counts -> mean and scale of the logistic normal."""

    def __init__(self, vocabulary: int, topics: int, hidden: int, dropout: float, affine: bool):
        super().__init__()
        self.first, self.second = nn.Linear(vocabulary, hidden), nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(dropout)
        self.loc, self.log_var = nn.Linear(hidden, topics), nn.Linear(hidden, topics)
        self.norm_loc = nn.BatchNorm1d(topics, affine=affine)
        self.norm_var = nn.BatchNorm1d(topics, affine=affine)

    def forward(self, x):
        """Return mean and scale, (N, topics)."""
        h = self.drop(F.softplus(self.second(F.softplus(self.first(x)))))
        return self.norm_loc(self.loc(h)), (0.5 * self.norm_var(self.log_var(h))).exp()


class Decoder(nn.Module):
    """Shares of the topics -> probabilities of the words."""

    def __init__(self, vocabulary: int, topics: int, dropout: float):
        super().__init__()
        self.beta = nn.Linear(topics, vocabulary, bias=False)
        self.norm = nn.BatchNorm1d(vocabulary, affine=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, theta):
        """Return probabilities, (N, vocabulary)."""
        return F.softmax(self.norm(self.beta(self.drop(theta))), -1)


class ProdLDA(nn.Module):
    """The tutorial's two programs; with `affine`, unlike there, the encoder's batch norms may scale and shift."""

    def __init__(self, vocabulary: int, topics: int = 3, hidden: int = 64, dropout: float = 0.2, affine: bool = False):
        super().__init__()
        self.topics = topics
        self.encoder = Encoder(vocabulary, topics, hidden, dropout, affine)
        self.decoder = Decoder(vocabulary, topics, dropout)

    def model(self, docs):
        """p(w) p(x|w)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", docs.shape[0]):
            loc = docs.new_zeros((docs.shape[0], self.topics))
            scale = docs.new_ones((docs.shape[0], self.topics))
            logtheta = pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))
            theta = F.softmax(logtheta, -1)
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, self.decoder(theta)), obs=docs)

    def guide(self, docs):
        """q(w|x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = self.encoder(docs)
            pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))


def corpus(size: int = 100, length: int = 20) -> tuple[Tensor, list[str], list[str]]:
    """Count words: (documents, words), the words, and where each document is from; documents of `length` words or more."""
    texts, origin = [], []
    for module in (scipy.linalg, scipy.signal, scipy.stats):
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if inspect.isroutine(thing) or inspect.isclass(thing):
                prose = re.split(BOILERPLATE, thing.__doc__ or "")[0]
                words = re.findall(r"[a-z]{3,}", re.sub(r":math:`[^`]*`", "", prose.lower()))
                texts.append([word for word in words if word not in ENGLISH_STOP_WORDS and word not in FORMAT])
                origin.append(module.__name__)
    spread = Counter(word for text in texts for word in set(text))
    common = [(-count, word) for word, count in spread.items() if count < len(texts) / 4]  # not in every docstring
    words = sorted(word for _, word in sorted(common)[:size])
    column = {word: j for j, word in enumerate(words)}
    counts = torch.zeros(len(texts), size)
    for row, text in zip(counts, texts, strict=True):
        for word in text:
            if word in column:
                row[column[word]] += 1
    long = counts.sum(-1) >= length
    return counts[long], words, [place for place, kept in zip(origin, long.tolist(), strict=True) if kept]


def train(docs: Tensor, epochs: int = 200, seed: int = 0, **sizes: int) -> ProdLDA:
    """Train by SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    lda = ProdLDA(docs.shape[1], **sizes)
    svi = SVI(lda.model, lda.guide, Adam({"lr": 5e-3}), TraceMeanField_ELBO())
    for epoch in range(epochs):
        loss = sum(svi.step(docs[rows]) for rows in torch.randperm(len(docs)).split(64))
        if (epoch + 1) % 50 == 0:
            print(f"epoch {epoch + 1}: -ELBO {loss / len(docs):.2f} nats")
    return lda.eval()


if __name__ == "__main__":
    docs, words, origin = corpus()
    order = torch.randperm(len(docs), generator=torch.Generator().manual_seed(0))
    held_out, rows = order[:30], order[30:]
    lda = train(docs[rows], affine="affine" in sys.argv)
    for topic in lda.decoder.beta.weight.T:
        print(" ".join(words[j] for j in topic.argsort(descending=True)[:10]))

    # all that Elbowroom needs
    import elbowroom as er

    audit = er.audit(lda.model, lda.guide, docs[held_out[:20]])
    print(audit)
    audit.save(sys.argv[1] if len(sys.argv) > 1 else "runs/topics")

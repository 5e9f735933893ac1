"""The paper's way to the same objective: Adam on D = sigmoid(theta) and R >= 0, dense, in torch.

Level by level from data rows, then all levels together at a tenth of the rate; the rate halves five
times over the epochs of a stage. The paper prints 2,000 epochs and a rate of 4e-4 halved every 500
(arXiv:2504.12359, appendix); with free parameters that rate hardly moves them, so 2e-2 is used.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

HALVINGS = 5


@dataclass
class AdamTwin:
    """Fits `atoms` per level; `state` holds everything that a resumed run needs."""

    x: torch.Tensor
    atoms: tuple[int, ...]
    sparsity: float
    reconstruction: float
    epochs: int = 2000
    rate: float = 2e-2
    seed: int = 0
    checkpoint: Path | None = None
    trace: list = field(default_factory=list)  # (stage, epoch, seconds, cpu seconds, objective)
    stage: int = 0
    epoch: int = 0
    seconds: float = 0.0
    cpu: float = 0.0

    def __post_init__(self):
        self.draw = torch.Generator().manual_seed(self.seed)
        self.levels, self.optimiser = [], None

    def fit(self, watch=lambda *_: None):
        """Best objective of the last stage, over all levels."""
        n_stages = len(self.atoms) + (len(self.atoms) > 1)
        if self.checkpoint and self.checkpoint.exists():
            self._restore()
        while self.stage < n_stages:
            self._run(watch)
            self.stage, self.epoch, self.optimiser = self.stage + 1, 0, None
        return min(total for stage, _, _, _, total in self.trace if stage == n_stages - 1)

    def _run(self, watch):
        if self.stage < len(self.atoms) and len(self.levels) == self.stage:
            self.levels.append(self._start(self.atoms[self.stage]))
        rate = self.rate if self.stage < len(self.atoms) else self.rate / 10
        self.optimiser = self.optimiser or torch.optim.Adam(self._free(), lr=rate)
        while self.epoch < self.epochs:
            begin, cpu = time.perf_counter(), time.process_time()
            self.optimiser.param_groups[0]["lr"] = rate * 0.5 ** (
                HALVINGS * self.epoch // self.epochs
            )
            self.optimiser.zero_grad()
            loss = self._loss()
            loss.backward()
            self.optimiser.step()
            with torch.no_grad():
                for codes in self._free()[1::2]:
                    codes.clamp_(min=0)
            self.seconds += time.perf_counter() - begin
            self.cpu += time.process_time() - cpu
            self.trace.append((self.stage, self.epoch, self.seconds, self.cpu, loss.item()))
            self.epoch += 1
            watch(*self.trace[-1])
            if self.checkpoint and self.epoch % 50 == 0:
                self._save()

    def _free(self):
        if self.stage < len(self.atoms):
            return list(self.levels[self.stage])
        return [tensor for level in self.levels for tensor in level]

    def _target(self, at):
        """Rows that a level explains and the weight of each."""
        if at == 0:
            return self.x, torch.full((len(self.x),), 1 / len(self.x))
        theta, codes = self.levels[at - 1]
        joint = self.stage == len(self.atoms)
        atoms = torch.sigmoid(theta) if joint else torch.sigmoid(theta).detach()
        return atoms, codes.detach().sum(0) / len(codes)

    def _start(self, n_atoms):
        rows, _ = self._target(len(self.levels))
        if n_atoms <= len(rows):
            picked = torch.randperm(len(rows), generator=self.draw)[:n_atoms]
        else:
            picked = torch.randint(0, len(rows), (n_atoms,), generator=self.draw)
        start = rows[picked] / rows[picked].amax(1, keepdim=True).clamp(min=1e-6)
        noise = 0.1 * torch.randn(start.shape, generator=self.draw)
        theta = torch.logit(start.clamp(0.02, 0.98)) + noise
        codes = 0.01 + 0.05 * torch.rand(len(rows), n_atoms, generator=self.draw)
        return theta.requires_grad_(), codes.requires_grad_()

    def _loss(self):
        stages = [self.stage] if self.stage < len(self.atoms) else range(len(self.atoms))
        return sum(self._level(at) for at in stages)

    def _level(self, at):
        (theta, codes), (rows, weight) = self.levels[at], self._target(at)
        error = (rows - codes @ torch.sigmoid(theta)).abs().sum(1)
        paid = self.sparsity * codes.sum(1) + self.reconstruction * error
        return codes.amax(0).sum() + (weight * paid).sum()

    def _save(self):
        keep = {name: getattr(self, name) for name in ("stage", "epoch", "seconds", "cpu", "trace")}
        tensors = [[tensor.detach() for tensor in level] for level in self.levels]
        part = self.checkpoint.with_suffix(".part")
        state = {"optimiser": self.optimiser.state_dict(), "draw": self.draw.get_state()}
        torch.save(keep | state | {"levels": tensors}, part)
        part.rename(self.checkpoint)

    def _restore(self):
        found = torch.load(self.checkpoint, weights_only=True)
        for name in ("stage", "epoch", "seconds", "cpu", "trace"):
            setattr(self, name, found[name])
        self.levels = [tuple(t.requires_grad_() for t in level) for level in found["levels"]]
        self.draw.set_state(found["draw"])
        self.optimiser = torch.optim.Adam(self._free())
        self.optimiser.load_state_dict(found["optimiser"])

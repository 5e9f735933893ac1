"""What every recording of a model's routing has: a folder, a manifest, and the model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecollab.models.groups import RouterGroups, groups_from_json


@dataclass(frozen=True)
class Recording:
    """A folder with a manifest that tells the model's shape."""

    path: Path
    manifest: dict[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own indices of its MoE layers."""
        return tuple(int(layer) for layer in self.manifest["model"]["layers"])

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.layers)

    @property
    def n_experts(self) -> int:
        """Routed experts per layer; the most that one has where layers differ."""
        return int(self.manifest["model"]["n_experts"])

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of every layer."""
        counts = self.manifest["model"].get("experts_per_layer", [self.n_experts] * self.n_layers)
        return tuple(int(count) for count in counts)

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.manifest["model"]["top_k"])

    @property
    def router_groups(self) -> RouterGroups | None:
        """Groups that the routers choose among; None if there are none or it is not known."""
        return groups_from_json(self.manifest["model"].get("router_groups"))

    @property
    def n_sites(self) -> int:
        """Routed experts over all layers."""
        return self.n_layers * self.n_experts

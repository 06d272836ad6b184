"""Cutting one dense gated feed-forward block into a shared expert and routed experts: pure maths on tensors.

    T tokens   H hidden width   F neurons of the dense block   E routed experts   k experts a token   S shared neurons

A gated block is `down @ (silu(gate @ x) * (up @ x))`. Its output is a sum over neurons, `sum_f a_f(x) * down[:, f]`, so
any split of the neurons into groups is exact as long as every group runs. What is lost is what the groups that a token
does not run would have added, and three steps keep that small:

1. The neurons with the most output energy go to the shared expert, which always runs (`strongest_neurons`).
2. The others are grouped by which tokens they fire on (`balanced_clusters`), so that groups can be left out as a whole.
3. Router and shared expert are fitted by ridge regression (`fit_router`, `ridge_solve`): the router to how much each
   group would add, the shared expert's down projection to make up for what the left-out groups would have added.

Example, F = 4, S = 2, E = 2, k = 1: neurons with energies [9, 1, 4, 1] give the shared expert [0, 2] and the routed
experts [1] and [3]; a token for which expert 1 would add more runs neurons 0, 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own idiom)
from torch import Tensor


@dataclass(frozen=True)
class SliceSettings:
    """How to cut one block. `experts * width + shared_neurons` must be the block's neurons for a whole width.

    The ridges are relative to the mean energy of an input dimension. `router_spread` is the standard deviation of the
    router's logits: small, so that the chosen experts' gains stay near the dense block's 1.
    """

    experts: int
    top_k: int
    shared_neurons: int
    router_ridge: float
    router_spread: float
    shared_ridge: float
    profile_tokens: int
    profile_dimensions: int
    cluster_rounds: int


@dataclass(frozen=True)
class SlicedBlock:
    """A block in pieces: gate and up rows are the dense block's own, by neuron index.

    shared [S] and groups [E, W]: neuron indices, int64. router [E, H]. shared_down [H, S]: refit; the routed neurons
    keep the dense block's columns.
    """

    shared: Tensor
    groups: Tensor
    router: Tensor
    shared_down: Tensor


def slice_block(
    hidden: Tensor, activations: Tensor, down: Tensor, settings: SliceSettings, generator: torch.Generator
) -> tuple[SlicedBlock, Tensor]:
    """Cuts one block and says what the pieces put out.

    hidden [T, H] (the block's input), activations [T, F] (its neurons on it), down [H, F] -> the pieces and their
    output [T, H] on the same tokens, which the next layer should be calibrated on. Raises ValueError if the neurons
    can't be cut as the settings say.
    """
    shared, others = strongest_neurons(activations, down, settings.shared_neurons)
    sample = torch.randperm(len(activations), generator=generator)[: settings.profile_tokens]
    profiles = firing_profiles(activations[sample][:, others], settings.profile_dimensions, generator)
    groups = others[balanced_clusters(profiles, settings.experts, settings.cluster_rounds, generator)]

    wanted = group_outputs(activations, down, groups)
    router = fit_router(hidden, wanted, settings.router_ridge, settings.router_spread)
    gains = expert_gains(*route(hidden, router, settings.top_k), settings.experts)

    routed = groups.flatten()
    always, full = activations[:, shared], activations[:, routed]
    kept = full * gains.repeat_interleave(groups.shape[1], dim=1)
    missing = (full - kept) @ down[:, routed].T
    shared_down = down[:, shared] + ridge_solve(always, missing, settings.shared_ridge).T
    output = always @ shared_down.T + kept @ down[:, routed].T
    return SlicedBlock(shared, groups, router, shared_down), output


def strongest_neurons(activations: Tensor, down: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` neurons with the largest mean squared output, and the others.

    activations [T, F], down [H, F] -> ([count], [F - count]), int64, strongest first.
    """
    energy = activations.pow(2).mean(0) * down.pow(2).sum(0)
    order = torch.sort(energy, descending=True, stable=True).indices
    return order[:count], order[count:]


def firing_profiles(activations: Tensor, dimensions: int, generator: torch.Generator) -> Tensor:
    """Unit vectors whose dot products approximate how alike two neurons' magnitudes are over the tokens.

    activations [T, N] -> [N, dimensions]. A random projection (Johnson-Lindenstrauss) of each neuron's magnitudes,
    which are scaled to unit norm and centred first: two neurons that are merely always on are not alike.
    """
    magnitudes = activations.abs()
    magnitudes = F.normalize(magnitudes, dim=0)
    magnitudes = magnitudes - magnitudes.mean(0)
    projection = torch.randn(len(activations), dimensions, generator=generator)
    return F.normalize(magnitudes.T @ projection, dim=1)


def balanced_clusters(profiles: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """k-means on unit vectors with equal cluster sizes.

    profiles [N, D] with N a multiple of `clusters` -> [clusters, N / clusters], int64: each row a cluster's members.
    A round lets vectors choose their most similar centre that has room, those with the clearest preference first.
    """
    count = len(profiles)
    if count % clusters:
        raise ValueError(f"{count} neurons can't be cut into {clusters} experts of equal size")
    room = count // clusters
    centres = profiles[torch.randperm(count, generator=generator)[:clusters]]
    for _ in range(iterations):
        members = _assign(profiles @ centres.T, room)
        centres = F.normalize(profiles[members].mean(1), dim=1)
    return members


def _assign(similarity: Tensor, room: int) -> Tensor:
    """[N, C] -> [C, room]: greedy assignment by clarity of preference, at most `room` rows a column."""
    clarity = similarity.max(1).values - similarity.mean(1)
    order = torch.sort(clarity, descending=True, stable=True).indices.tolist()
    preferences = torch.sort(similarity, dim=1, descending=True, stable=True).indices.tolist()
    members: list[list[int]] = [[] for _ in range(similarity.shape[1])]
    for row in order:
        column = next(c for c in preferences[row] if len(members[c]) < room)
        members[column].append(row)
    return torch.tensor(members)


def group_outputs(activations: Tensor, down: Tensor, groups: Tensor) -> Tensor:
    """How much each group adds to each token: the norm of its output, less what it adds on average.

    activations [T, F], down [H, F], groups [E, W] -> [T, E]. The average is taken off because the shared
    expert can stand in for it.
    """
    centred = activations - activations.mean(0)
    norms = []
    for members in groups:
        # |down @ a|^2 = a @ (down.T @ down) @ a, in the group's few neurons instead of the hidden width.
        gram = down[:, members].T @ down[:, members]
        part = centred[:, members]
        norms.append(((part @ gram) * part).sum(1).clamp_min(0).sqrt())
    return torch.stack(norms, dim=1)


def fit_router(hidden: Tensor, wanted: Tensor, ridge: float, spread: float) -> Tensor:
    """A linear router whose logits rank the experts by `wanted`.

    hidden [T, H], wanted [T, E] -> [E, H]. Ridge regression, `ridge` relative to the mean energy of a hidden dimension.
    The weights are then centred over the experts, which softmax and top-k don't see but which keeps low-precision
    logits apart, and scaled so that the logits have the standard deviation `spread` over the calibration tokens.
    """
    router = ridge_solve(hidden, wanted, ridge).T
    router = router - router.mean(0)
    return router * (spread / (hidden @ router.T).std())


def route(hidden: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token and their weights, which sum to 1 (softmax, renormalised over the chosen).

    hidden [T, H], router [E, H] -> ids [T, k] int64, weights [T, k].
    """
    logits, ids = (hidden @ router.T).topk(top_k, dim=-1)
    return ids, logits.softmax(-1)


def expert_gains(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """What each expert's output is multiplied with: k * weight if chosen, else 0.

    ids [T, k], weights [T, k] -> [T, E]. The factor k makes the mean gain of the chosen experts 1, as in the dense
    block; in the checkpoint it is part of the experts' down projections.
    """
    return torch.zeros(len(ids), experts).scatter(1, ids, weights * ids.shape[1])


def ridge_solve(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """`argmin_B |targets - inputs @ B|^2 + ridge * m * |B|^2`, m the mean over dimensions of the inputs' energy.

    inputs [T, N], targets [T, M] -> [N, M].
    """
    gram = inputs.T @ inputs
    penalty = ridge * gram.diagonal().mean()
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(inputs.T @ targets, torch.linalg.cholesky(gram))

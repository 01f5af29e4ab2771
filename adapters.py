"""Train a model that is large for its GPU: low-rank adapters and recomputation.

A fork needs this file for --lora-rank and --recompute only. No line depends on the algorithm that
trains.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from runtime import require, warn


def recompute(policy) -> None:
    """Let each layer keep only its input for the backward pass. There the layer runs again."""

    def run(forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    for layer in policy.layers():
        layer.forward = functools.partial(run, layer.forward)


class Lora(torch.nn.Module):
    """Low-rank adapters on every linear map of the layers: W x + B A x (Hu et al. 2021).

    B is 0 at first. The adapters are hooks, so the names and the checkpoint of the model stay.
    Experts whose weights are one tensor get no adapters, and routers get none. frozen_dtype: that
    of W. "auto" is bfloat16 if a GPU computes in it, and float32 otherwise.
    """

    def __init__(self, policy, rank: int, frozen_dtype: str = "float32"):
        super().__init__()
        policy.model.requires_grad_(False)
        self.policy, self.mode = [policy], "on"  # or "off" or "merged"
        auto = "bfloat16" if policy.bfloat16 and policy.device.type == "cuda" else "float32"
        self.frozen_dtype = auto if frozen_dtype == "auto" else frozen_dtype
        fits = policy.bfloat16 or self.frozen_dtype == "float32"
        require(fits, "--frozen-dtype bfloat16 needs --dtype bfloat16")
        # A list of modules would make them part of the adapters. A head is part of them.
        self.head = policy.linear and policy.linear.requires_grad_(True)
        modules = policy.layers().modules()
        self.targets = [m for m in modules if type(m) in (torch.nn.Linear, Conv1D)]
        require(self.targets, "--lora-rank: this model has no plain linear layers for adapters")
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for i, module in enumerate(self.targets):
            # The Conv1D of GPT-2 keeps its weight as [in, out].
            transposed, weight = isinstance(module, Conv1D), module.weight
            n_out, n_in = weight.T.shape if transposed else weight.shape
            size = min(rank, n_in, n_out)
            down = torch.randn(size, n_in, device=weight.device) / n_in**0.5
            self.down.append(torch.nn.Parameter(down))
            self.up.append(torch.nn.Parameter(torch.zeros(n_out, size, device=weight.device)))
            weight.data = weight.data.to(getattr(torch, self.frozen_dtype))
            module.register_forward_hook(functools.partial(self._add, i))

    def _add(self, i: int, module, inputs, output: torch.Tensor) -> torch.Tensor:
        # Sums in bfloat16 would round most of a small change off. With the adapters off the output
        # is float32 as well, so the KL is 0 at first even in bfloat16.
        if self.mode == "merged":
            return output
        if self.mode == "off":
            return output.float()
        change = F.linear(F.linear(inputs[0], self.down[i]), self.up[i])
        return output.float() + change.float()

    @contextlib.contextmanager
    def switch(self, mode: str):
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def off(self):
        """Switch to the initial model."""
        return self.switch("off")

    @contextlib.contextmanager
    def exact(self):
        """Compute in float32, as long as all weights are float32. Then merging rounds nothing."""
        (policy,) = self.policy
        dtype = "bfloat16" if policy.bfloat16 else "float32"
        policy.set_dtype(dtype if self.frozen_dtype == "bfloat16" else "float32")
        try:
            yield
        finally:
            policy.set_dtype(dtype)

    def merged_weight(self, i: int) -> torch.Tensor:
        """Return W + B A of a linear map, in float32."""
        change, module = self.up[i].data @ self.down[i].data, self.targets[i]
        return module.weight.data.float() + (change.T if isinstance(module, Conv1D) else change)

    def merged_weights(self) -> dict[str, torch.Tensor]:
        """Return the state of the model with merged weights, which are on the CPU."""
        if self.policy[0].bfloat16:
            warn("evaluate model/ with --dtype float32: bfloat16 rounds much of the change off")
        model, index = self.policy[0].model, {id(m.weight): i for i, m in enumerate(self.targets)}
        names = {name: index[id(p)] for name, p in model.named_parameters() if id(p) in index}
        merged = {name: self.merged_weight(i).cpu() for name, i in names.items()}
        return model.state_dict() | merged

    @contextlib.contextmanager
    def merged(self):
        """Add the adapters to the weights, to sample without them.

        bfloat16 rounds the sums: the neighbours of 0.1 are 0.0005 away. So they are rounded up or
        down at random, and a small change stays on average. The old weights are on the CPU.
        """
        kept = [module.weight.data.to("cpu", copy=True) for module in self.targets]
        random = torch.Generator(self.down[0].device).manual_seed(0)
        try:
            for i, module in enumerate(self.targets):
                weight = self.merged_weight(i)
                if self.policy[0].bfloat16:
                    weight = round_at_random(weight, random)
                module.weight.data.copy_(weight)
            with self.switch("merged"):
                yield
        finally:
            for module, weight in zip(self.targets, kept, strict=True):
                module.weight.data.copy_(weight)


def round_at_random(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Round float32 to values of bfloat16, up or down with a mean of x."""
    # bfloat16 is the upper half of the bits.
    how = dict(dtype=torch.int32, device=x.device, generator=random)
    noise = torch.randint(1 << 16, x.shape, **how)
    return (x.contiguous().view(torch.int32) + noise & -(1 << 16)).view(torch.float32)

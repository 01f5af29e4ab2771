"""Make a decoding step cheaper: CUDA graphs, packed weights, fused norms."""

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable

import torch
from tqdm import tqdm

# A fast path that failed once: "fused attention" or "graphs".
disabled: set[str] = set()


def disable(name: str, reason: str) -> None:
    disabled.add(name)
    tqdm.write(f"warning: sampling is slower than it could be: {reason}", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the device ran out. PyTorch and CUDA have many messages."""
    messages = ("t allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(message in str(error) for message in messages)


class Graphs:
    """Keep the CUDA graphs of the decoding steps so far, one per size of a step."""

    def __init__(self, device: torch.device, batch_size: int):
        self.device, self.batch_size, self.growths = device, batch_size, -1
        self.by_size, self.memory = {}, None

    def check(self, growths: int) -> None:
        """Forget the graphs if the tensors that they read were replaced by larger ones."""
        if growths != self.growths:
            self.growths = growths
            self.by_size.clear()
            # All graphs share their memory because only one runs at a time.
            self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def round_up(self, used):
        """Round the dimensions of a step up, so that one CUDA graph serves many steps.

        Take the smallest recorded size that fits. Each dimension may be at most twice too large.
        If no size fits, make a new one. Round the rows to the batch size divided by a power of 2.
        Round the other dimensions to the next of 1, 2, 3 ... 8, 10, 12, 14, 16, 20 ...
        """
        pairs = [(size, list(zip(used, size, strict=True))) for size in self.by_size]
        fits = [size for size, pair in pairs if all(a <= b <= 2 * a for a, b in pair)]
        if fits:
            return min(fits, key=sum)
        grains = [1 << max(0, (count - 1).bit_length() - 3) for count in used[1:]]
        rest = [-(-count // grain) * grain for count, grain in zip(used[1:], grains, strict=True)]
        return type(used)(self.batch_size >> int(math.log2(self.batch_size / used[0])), *rest)

    def run(self, step: Callable, size, view, n_steps: int) -> None:
        """Make `n_steps` steps of this size. The first step of a new size is recorded."""
        run = functools.partial(step, size.rows, view)
        if size in self.by_size:
            run, static = self.by_size[size]
            for old, new in zip(static, view, strict=True):
                old.copy_(new)
        elif "graphs" not in disabled:
            run, n_steps = self._first_step(run), n_steps - 1
            if "graphs" not in disabled:
                self.by_size[size] = run, view
        for _ in range(n_steps):
            run()

    def _first_step(self, run: Callable[[], None]) -> Callable[[], None]:
        """Make a step of a new size and record it as a graph. Return a function that replays it.

        The step itself warms up the graph. If the step cannot be recorded, return `run`.
        """
        done = False
        try:
            with waiting_is_an_error(self.device):
                run()
            done = True
            return record(run, self.device, self.memory)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
        if not done:
            # Make the step again. Until its end it changes nothing that it reads.
            run()
        disable("graphs", f"a step cannot be recorded ({reason})")
        return run


@contextlib.contextmanager
def packed_weights(model: torch.nn.Module):
    """Lay the weights of linear layers out for the kernels of oneDNN. Only on a CPU.

    Otherwise every product rearranges the weights. SmolLM2 is then 1.2 to 2 times slower. With the
    last 4 rows of a batch it is 5 times slower. This costs a second copy of the weights. Use it
    without gradients only.
    """
    usable = next(model.parameters()).device.type == "cpu" and torch.backends.mkldnn.is_available()
    # Under autocast the products are bfloat16.
    usable = usable and not torch.is_autocast_enabled("cpu")
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    layers = [m for m in layers if m.weight.numel() >= 1 << 15]
    layers = layers if usable and pack and linear else []
    for layer in layers:
        packed = pack(layer.weight.detach())
        layer.forward = lambda x, w=packed, bias=layer.bias: linear(x, w, bias, "none", [], "")
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def casts_kept(model: torch.nn.Module):
    """Let autocast keep its bfloat16 copies of frozen weights from step to step.

    Autocast keeps them only for weights that require a gradient. Use it without gradients only.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def rms_norm(weight: torch.Tensor, eps: float, promotes: bool, x: torch.Tensor) -> torch.Tensor:
    normed = torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return normed.to(torch.promote_types(x.dtype, weight.dtype) if promotes else x.dtype)


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> None:
    """Let PyTorch compute root mean square norms in one kernel instead of six small ones.

    Modules with a different result stay as they are, for example the norm of Gemma.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        known = type(module).__name__.endswith("RMSNorm") and getattr(module, "bias", None) is None
        if known and isinstance(eps, float) and isinstance(weight, torch.nn.Parameter):
            x = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device)
            x = x.view(2, *weight.shape)
            try:
                promotes = module(x.bfloat16()).dtype != torch.bfloat16
                # A lambda would not do. A deep copy of the module must use its own weight.
                fused = functools.partial(rms_norm, weight, eps, promotes)
                same = torch.allclose(module(x), fused(x), rtol=1e-4, atol=1e-5)
            # The module has another signature.
            except (TypeError, RuntimeError):
                continue
            if same:
                module.forward = fused


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device):
    """Raise RuntimeError if the host waits for the GPU. Then a graph cannot be recorded.

    A failed recording is worse. After it, older releases of PyTorch cannot free memory any more
    (PyTorch issues 180395 and 190348).
    """
    if device.type == "cuda":
        with warnings.catch_warnings():
            # PyTorch warns that this mode is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def record(step: Callable[[], None], device: torch.device, graph_memory) -> Callable[[], None]:
    """Return a CUDA graph of `step` that runs without Python. On a CPU return `step`."""
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=graph_memory):
            step()
    except RuntimeError as error:
        # Leave the stream of the failed recording.
        torch.cuda.set_stream(stream)
        # The end of a failed recording fails as well and hides the reason.
        raise (error.__context__ or error) from None
    return graph.replay

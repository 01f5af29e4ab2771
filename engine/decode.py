"""Sample many sequences at once. Token ids go in; token ids and log-probabilities come out.

`generate_tokens` runs each prompt once and shares its keys and values among its samples. When a
sequence has finished, the next sample takes its row of the batch. On a CPU the host reads the
tokens after every step. On a GPU it reads them after every 16th step, and a step is a CUDA graph.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .cache import PAGE, PagedCache, PageTable, View, cache_argument
from .graphs import Graphs, casts_kept, disable, disabled, packed_weights
from .kernel import KernelError, attention_masks, triton

FUSED_DEVICES = {"cuda"} if triton else set()
GRAPH_DEVICES = {"cuda"}


class Output(NamedTuple):
    """Hold one sampled sequence. It is `finished` if it ended by itself.

    prompt: the index of the prompt. number: the number of the sample, from 0. ids include the
    end-of-text token.
    """

    prompt: int
    number: int
    ids: np.ndarray  # [length] int32
    logprobs: np.ndarray  # [length] float32
    finished: bool


class Request(NamedTuple):
    """Hold the arguments of sampling. Every list has one entry per prompt.

    pending maps the index of a prompt to its sample numbers. limits: the most tokens of a sample.
    pick maps hidden states [rows, width] and uniforms [rows] to tokens [rows] and their
    log-probabilities [rows]. seeds and the number of a sample key its uniforms.
    breaks_line [vocabulary] marks the tokens with a line break. After each of them the token
    `label` follows without being sampled, with log-probability 0. There `is_complete` may end the
    sequence.
    """

    prompts: list[list[int]]
    pending: dict[int, Sequence[int]]
    limits: list[int]
    seeds: list[list[int]]
    pick: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    eos_ids: list[int]
    breaks_line: np.ndarray
    label: int | None = None
    is_complete: Callable[[np.ndarray], bool] | None = None
    stop: Callable[[], bool] = lambda: False

    def uniforms(self, prompt: int, number: int, length: int) -> np.ndarray:
        """Return the uniforms of a sample: [length], in [0, 1)."""
        generator = np.random.default_rng([*self.seeds[prompt], number])
        return generator.random(length, np.float32)


def generate_tokens(model, batch_size: int, **request) -> Iterator[Output]:
    """Yield the samples of a request in the order in which they finish.

    request: the fields of `Request`.

    Raises FloatingPointError if a log-probability is not finite, and KeyboardInterrupt if
    `request.stop()` is true before a step. Run it without gradients.
    """
    request, device = Request(**request), next(model.parameters()).device
    with packed_weights(model), casts_kept(model):
        while True:
            fused = device.type in FUSED_DEVICES and "fused attention" not in disabled
            try:
                yield from Decoder(model, request, batch_size, fused).run()
                return
            except KernelError as error:
                disable("fused attention", f"the fused attention does not work here ({error})")


class Decoder:
    """Decode the batch of one request. Keep which row samples what, and the tokens so far.

    The state of the rows lives on the device. A step touches nothing else. Between two reads the
    host does not know what was sampled. A row is computed only if its index is below
    `self.active`.
    """

    def __init__(self, model, request: Request, batch_size: int, fused: bool):
        self.request, self.batch_size = request, batch_size
        self.base, self.config = model.base_model, model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type in GRAPH_DEVICES
        # Steps between two reads.
        self.stride = 16 if self.on_gpu else 1
        self.last_position = (getattr(self.config, "max_position_embeddings", None) or 1 << 30) - 1
        longest_prompt = max(1, max(map(len, request.prompts)) - 1)
        self.cache = PagedCache(longest_prompt, fused)
        self.cache_argument = {cache_argument(self.base): self.cache, "use_cache": True}
        self.graphs = Graphs(self.device, batch_size)

        # A row may run on until the host reads the tokens.
        self.longest = max(request.limits)
        width = self.longest + self.stride - 1
        shape = batch_size, width
        self.uniforms = torch.zeros(shape, device=self.device)
        self.tokens = torch.zeros(shape, device=self.device, dtype=torch.long)
        self.logprobs = torch.zeros(shape, device=self.device)
        state = torch.zeros(3, batch_size, device=self.device, dtype=torch.long)
        self.ages, self.starts, self.inputs = state
        self.breaks_line = torch.from_numpy(request.breaks_line).to(self.device)

        # The host's side.
        self.active = 0
        self.host_ages = np.zeros(batch_size, np.int64)
        self.table = PageTable(self.cache, batch_size, width)
        self.jobs: list[tuple[int, int] | None] = [None] * batch_size
        numbers = request.pending.items()
        self.queue = ((i, number) for i, numbers_of_i in numbers for number in numbers_of_i)
        self.next_prompts = iter(request.pending)
        self.samples_left = {i: len(numbers_of_i) for i, numbers_of_i in numbers}
        self.is_eos = np.zeros(len(request.breaks_line), bool)
        self.is_eos[request.eos_ids] = True
        self.finished: list[Output] = []

    def run(self) -> Iterator[Output]:
        """Yield every sample. On a GPU, finished samples are handled during the next step."""
        try:
            self.active = len(self.fill(range(self.batch_size)))
            while self.active:
                if self.request.stop():
                    raise KeyboardInterrupt
                self.advance()
                yield from self.take_finished()
                vacant = self.collect()
                self.close_gaps(set(vacant) - set(self.fill(vacant)))
        except (RuntimeError, MemoryError):
            yield from self.take_finished()
            raise
        yield from self.take_finished()

    def take_finished(self) -> list[Output]:
        finished, self.finished = self.finished, []
        return finished

    # ---- filling rows

    def fill(self, rows: Sequence[int]) -> list[int]:
        """Give rows to the next samples. Return the rows that got one."""
        taken = []
        for row in rows:
            if (job := next(self.queue, None)) is None:
                break
            if job[0] not in self.table.slot_of_prompt:
                samples = len(self.request.pending[job[0]])
                self.prefill(max(1, min(64, self.batch_size // samples)))
            self.jobs[row] = job
            taken.append(row)
        if taken:
            jobs, prompts = [self.jobs[row] for row in taken], self.request.prompts
            index = torch.tensor(taken, device=self.device)
            uniforms = np.stack([self.request.uniforms(*job, self.longest) for job in jobs])
            self.uniforms[index, : uniforms.shape[1]] = torch.from_numpy(uniforms).to(self.device)
            last = torch.tensor([[len(prompts[i]) - 1, prompts[i][-1]] for i, _ in jobs])
            self.starts[index], self.inputs[index] = last.T.to(self.device)
            self.ages[index] = 0
            self.host_ages[taken] = 0
            self.table.row_slot[taken] = [self.table.slot_of_prompt[i] for i, _ in jobs]
        return taken

    def prefill(self, count: int) -> None:
        """Run the next `count` prompts. Their last tokens are decoded like any other."""
        batch = list(itertools.islice(self.next_prompts, count))
        prompts = [self.request.prompts[i][:-1] for i in batch]
        length = max(1, *map(len, prompts))
        padded = [(ids + [0] * length)[:length] for ids in prompts]
        ids = torch.tensor(padded, device=self.device)
        positions = torch.arange(length, device=self.device)[None].expand(len(ids), -1)
        masks = attention_masks(self.config, positions, length)
        self.cache.recorded = []
        self.base(
            input_ids=ids, position_ids=positions, attention_mask=masks, **self.cache_argument
        )
        self.table.slot_of_prompt.update(zip(batch, self.cache.keep_prompts(), strict=True))

    # ---- one step

    def step(self, n: int, view: View) -> None:
        """Sample one token for each of the first n rows. Touches the device only."""
        self.cache.begin_step(self.ages[:n], self.starts[:n], view)
        positions = (self.starts[:n] + self.ages[:n]).clamp_(max=self.last_position)[:, None]
        # The mask is not used. Without one the model would make a mask of its own.
        hidden = self.base(
            input_ids=self.inputs[:n, None],
            position_ids=positions,
            attention_mask=attention_masks(self.config, positions * 0, 1),
            **self.cache_argument,
        ).last_hidden_state[:, -1]
        age = self.ages[:n, None]
        picked, logprobs = self.request.pick(hidden, self.uniforms[:n].gather(1, age)[:, 0])
        if self.request.label is not None:
            forced = self.breaks_line[self.inputs[:n]]
            picked = picked.masked_fill(forced, self.request.label)
            logprobs = logprobs.masked_fill(forced, 0.0)
        self.tokens[:n].scatter_(1, age, picked[:, None])
        self.logprobs[:n].scatter_(1, age, logprobs[:, None])
        self.inputs[:n] = picked
        self.ages[:n] += 1

    def advance(self) -> None:
        """Make `stride` steps of at least the active rows."""
        n = self.active
        self.ages[n:] = 0
        self.table.add_pages(self.host_ages[:n] + self.stride)
        size, columns = self.table.used(n), self.table.pages.shape[1]
        if self.on_gpu:
            self.graphs.check(self.cache.growths)
            size = self.graphs.round_up(size)
        else:
            # On a GPU the longest row would need one graph after another as it grows.
            columns = (self.host_ages[:n].max() + self.stride - 1) // PAGE + 1
        view = self.table.view(n, size, columns, self.device)
        if self.on_gpu:
            self.graphs.check(self.cache.growths)
            self.graphs.run(self.step, size, view, self.stride)
        else:
            self.step(size.rows, view)

    # ---- after a step

    def collect(self) -> list[int]:
        """Read what was sampled. Move ended samples to `finished` and return their rows."""
        n, request = self.active, self.request
        tokens, logprobs = self.tokens[:n].cpu().numpy(), self.logprobs[:n].cpu().numpy()
        before = self.host_ages[:n].copy()
        self.host_ages[:n] += self.stride
        columns = before[:, None] + np.arange(self.stride)
        new = np.take_along_axis(tokens, columns, 1)
        if not np.isfinite(np.take_along_axis(logprobs, columns, 1)).all():
            raise FloatingPointError("the model's probabilities are not finite")
        ends = self.is_eos[new]
        if request.is_complete:
            for row, column in np.argwhere(request.breaks_line[new] & ~ends):
                ends[row, column] = request.is_complete(tokens[row, : before[row] + column + 1])
        limit = np.array([request.limits[i] for i, _ in self.jobs[:n]])
        ends &= columns < limit[:, None]
        ended = ends.any(1)
        length = np.where(ended, before + ends.argmax(1) + 1, limit)
        vacant = np.flatnonzero(ended | (self.host_ages[:n] >= limit)).tolist()
        for row in vacant:
            i, number = self.jobs[row]
            ids = tokens[row, : length[row]].astype(np.int32)
            own_logprobs = logprobs[row, : length[row]].copy()
            self.finished.append(Output(i, number, ids, own_logprobs, bool(ended[row])))
            self.samples_left[i] -= 1
            self.table.free(row)
            if not self.samples_left[i]:
                self.table.free_prompt(i)
        return vacant

    def close_gaps(self, vacant: set[int]) -> None:
        """Move the last rows into the vacant ones, so that the active rows come first."""
        n = self.active = self.active - len(vacant)
        gaps = sorted(row for row in vacant if row < n)
        last = [row for row in range(n, n + len(vacant)) if row not in vacant]
        if not gaps:
            return
        on_device = self.uniforms, self.tokens, self.logprobs, self.ages, self.starts, self.inputs
        for state in (*on_device, self.host_ages):
            state[gaps] = state[last]
        self.table.move(gaps, last)
        for gap, row in zip(gaps, last, strict=True):
            self.jobs[gap] = self.jobs[row]

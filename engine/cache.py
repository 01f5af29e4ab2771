"""Keys and values of the sequences that are being decoded.

A prompt lies in a slot. The sampled tokens of a sequence lie in pages.
"""

import heapq
import inspect
import typing
from collections.abc import Iterable

import numpy as np
import torch

PAGE = 32  # tokens


class Pool:
    """Number the slots of prompts, or the pages of sampled tokens.

    The keys and values of a prompt or page have the same number in all layers. `growths` counts
    how often the tensors were replaced by larger ones.
    """

    def __init__(self):
        # Per layer [keys, values], each [slots or pages, ...] and one block of memory.
        self.layers, self.growths = [], 0
        # A heap. The lowest number comes first, so that the used ones lie together.
        self.free = []

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def reserve(self, size: int) -> None:
        """Grow to at least `size` slots or pages."""
        old = len(self)
        if size > old:
            for layer in self.layers:
                for i, t in enumerate(layer):
                    layer[i] = t.new_zeros(size, *t.shape[1:])
                    layer[i][:old] = t
            # The new numbers are larger than all others, so the list stays a heap.
            self.free += range(old, size)
            self.growths += 1

    def take(self, count: int) -> list[int]:
        """Return `count` free numbers. If there are too few, grow by a quarter or more."""
        if len(self.free) < count:
            self.reserve(len(self) + max(count, len(self) // 4))
        return [heapq.heappop(self.free) for _ in range(count)]

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            heapq.heappush(self.free, number)

    def compact(self, used: np.ndarray, first: int) -> np.ndarray | None:
        """Move the used numbers together if a quarter of the numbers below the highest is free.

        A step computes everything up to the highest number. Without a move, most of this would be
        unused while the last samples run. The used numbers start at `first`. Returns the new
        numbers by the old ones, or None if nothing was moved.
        """
        if used.max() + 1 <= 1.25 * (len(used) + first) + 4:
            return None
        new, target = np.arange(len(self)), np.arange(first, first + len(used))
        moved, new[used] = used != target, target
        self.free = list(range(first + len(used), len(self)))
        device = self.layers[0][0].device
        old, target = (torch.from_numpy(t[moved]).to(device) for t in (used, target))
        for layer in self.layers:
            for t in layer:
                t[target] = t[old]
        return new


class PagedCache:
    """Stand in for a transformers cache during decoding.

    The model calls `update` once per layer and passes the result to `paged_attention`. A prompt is
    stored once, in a slot, and all of its samples read it. The sampled tokens of a sequence lie in
    pages of 32. So a short sample needs little memory even if another one is long. When a row goes
    to the next sample, nothing is moved.
    """

    def __init__(self, longest_prompt: int, fused: bool = False):
        # Keys and the values of prompts: [slots or pages, key heads, tokens, head_dim].
        # The values of sampled tokens: [pages, key heads, head_dim, tokens]. This order is faster
        # if few rows read a page.
        self.prompts, self.own = Pool(), Pool()
        self.longest_prompt, self.fused = longest_prompt, fused
        # Per layer (keys, values) while prompts are run, otherwise None.
        self.recorded = None

    @property
    def growths(self) -> int:
        """Return how often the tensors of the cache were replaced by larger ones."""
        return self.prompts.growths + self.own.growths

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        if self.recorded is not None:
            self.recorded.append((keys, values))
            return keys, values
        return CachedLayer(self, layer, keys[:, :, 0]), CachedLayer(self, layer, values[:, :, 0])

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def keep_prompts(self) -> list[int]:
        """Move the recorded keys and values into slots. Return the numbers of the slots."""
        recorded, self.recorded = self.recorded, None
        if not self.own.layers:
            self._make_layers(recorded)
        slots = self.prompts.take(len(recorded[0][0]))
        for layer, pair in zip(self.prompts.layers, recorded, strict=True):
            for stored, new in zip(layer, pair, strict=True):
                stored[slots, :, : new.shape[2]] = new.to(stored.dtype)
        return slots

    def _make_layers(self, recorded: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Create the layers. The first prompts tell their number and their shapes."""
        for keys, values in recorded:
            # Under autocast keys are float32, but attention works in bfloat16.
            device, dtype = values.device.type, values.dtype
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            heads, width, value_width = keys.shape[1], keys.shape[3], values.shape[3]
            prompts = [(heads, self.longest_prompt, size) for size in (width, value_width)]
            own = (heads, PAGE, width), (heads, value_width, PAGE)
            for pool, shapes in ((self.prompts, prompts), (self.own, own)):
                pool.layers.append([values.new_zeros(0, *shape, dtype=dtype) for shape in shapes])
        # Page 0 belongs to no sample. It stands for "no page" in the table of a row.
        self.own.take(1)

    def begin_step(self, ages: torch.Tensor, starts: torch.Tensor, view: "View") -> None:
        """Describe the next forward pass.

        ages [rows]: the number of sampled tokens of a row that are cached. starts [rows]: the
        position of the first of them. view: where the keys and values lie.
        """
        self.ages, self.starts, self.view, self.biases = ages, starts, view, {}
        if not self.fused:
            self.page, self.place = view.table.gather(1, ages[:, None] // PAGE)[:, 0], ages % PAGE

    def bias(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return 0 where a row sees a key and -1e30 where it does not. All layers share it.

        The shape is [slots, 1, readers, 1, keys] for prompts and [pages, 1, 1, 1, keys] for sampled
        tokens. window: the window of sliding attention, or None.
        """
        if window not in self.biases:
            view, longest = self.view, self.longest_prompt
            column = torch.arange(max(longest, PAGE), device=self.ages.device)
            prompt_length = self.starts[view.grid][..., None]
            query = (self.starts + self.ages)[view.grid][..., None]
            seen = column[:longest] < prompt_length
            # The distance of a key from the query.
            back = (self.ages[view.own_row] - view.own_first)[:, None] - column[:PAGE]
            own_seen = back >= 0
            if window is not None:
                seen &= query - column[:longest] < window
                own_seen &= back < window
            prompt_bias = torch.where(seen, 0.0, -1e30)[:, None, :, None]
            own_bias = torch.where(own_seen, 0.0, -1e30)[:, None, None, None]
            self.biases[window] = prompt_bias, own_bias
        return self.biases[window]


class CachedLayer(typing.NamedTuple):
    """Hold the keys or the values of a layer for `paged_attention`.

    new [rows, key heads, width]: the keys or values of this step. The attention stores them.
    """

    cache: PagedCache
    layer: int
    new: torch.Tensor  # [rows, key heads, width]


class Size(typing.NamedTuple):
    """Hold the dimensions of a step. It computes all of them, also the unused ones."""

    rows: int
    slots: int
    # The most rows that read one slot.
    readers: int
    pages: int


# A view is made of arrays first and of tensors in the end.
EMPTY = np.zeros(0, np.int64)


class View(typing.NamedTuple):
    """Tell a step where its keys and values lie.

    slot: the slot of a row's prompt. table: the pages of a row, 0 for "no page". grid: the rows
    that read a slot, padded with row 0. reader: the rank of a row among the rows of its slot.
    own_row: the row that owns a page. own_first: the index of a page's first token in its row.

    Unused slots and pages are computed as well. Their results are ignored. The fused kernel reads
    only `slot` and `table`.

    Example: rows 0 and 2 sample after the prompt in slot 0, row 1 after the prompt in slot 1. Row 0
    has 41 tokens of its own, in pages 1 and 4. The others have fewer than 32, in pages 2 and 3:

        slot  [0, 1, 0]           grid    [[0, 2], [1, 0]]    own_row    [0, 0, 1, 2, 0]
        table [[1, 4], [2, 0],    reader  [0, 0, 1]           own_first  [far, 0, 0, 0, 32]
               [3, 0]]
    """

    slot: torch.Tensor  # [rows]
    table: torch.Tensor  # [rows, pages of a row]
    grid: torch.Tensor = EMPTY  # [slots, readers]
    reader: torch.Tensor = EMPTY  # [rows]
    own_row: torch.Tensor = EMPTY  # [pages]
    own_first: torch.Tensor = EMPTY  # [pages]


class PageTable:
    """Keep on the host where every row of the batch finds its keys and values."""

    def __init__(self, cache: PagedCache, batch_size: int, width: int):
        self.cache, self.width = cache, width
        # The pages of a row, 0 for "no page".
        self.pages = np.zeros((batch_size, (width - 1) // PAGE + 1), np.int64)
        # The slot of a row's prompt.
        self.row_slot = np.zeros(batch_size, np.int64)
        self.slot_of_prompt: dict[int, int] = {}

    def add_pages(self, lengths: np.ndarray) -> None:
        """Give the first rows the pages that they need. lengths [rows]: their tokens."""
        pages, needed = self.pages[: len(lengths)], (lengths - 1) // PAGE + 1
        missing = (pages == 0) & (np.arange(pages.shape[1]) < needed[:, None])
        pages[missing] = self.cache.own.take(int(missing.sum()))

    def free(self, row: int) -> None:
        self.cache.own.give_back(self.pages[row][self.pages[row] > 0].tolist())
        self.pages[row] = 0

    def free_prompt(self, prompt: int) -> None:
        self.cache.prompts.give_back([self.slot_of_prompt.pop(prompt)])

    def move(self, targets: list[int], rows: list[int]) -> None:
        for state in (self.pages, self.row_slot):
            state[targets] = state[rows]
        self.pages[rows] = 0

    def used(self, n: int) -> Size:
        """Return the size of a step of the first n rows. Close large gaps between used numbers.

        The fused kernel finds its keys row by row. So for it only the number of rows counts.
        """
        if self.cache.fused:
            return Size(n, 0, 0, 0)
        pages = self.pages[:n]
        if (new := self.cache.own.compact(np.unique(pages[pages > 0]), 1)) is not None:
            pages[:] = new[pages]
        slots = np.array(sorted(self.slot_of_prompt.values()))
        if (new := self.cache.prompts.compact(slots, 0)) is not None:
            self.row_slot[:n] = new[self.row_slot[:n]]
            self.slot_of_prompt = {i: int(new[s]) for i, s in self.slot_of_prompt.items()}
        readers = np.bincount(self.row_slot[:n])
        return Size(n, len(readers), int(readers.max()), int(pages.max()) + 1)

    def view(self, n: int, size: Size, columns: int, device: torch.device) -> View:
        """Return where a step of the first n rows finds its keys, padded to `size`."""
        slot = np.zeros(size.rows, np.int64)
        slot[:n] = self.row_slot[:n]
        order = {} if self.cache.fused else self._group_by_prompt(n, size)
        view = View(slot, self.pages[: size.rows, :columns], **order)
        return View(*(torch.from_numpy(array).to(device) for array in view))

    def _group_by_prompt(self, n: int, size: Size) -> dict[str, np.ndarray]:
        """Order the rows by prompt. Then a prompt is multiplied with all its queries at once."""
        self.cache.prompts.reserve(size.slots)
        self.cache.own.reserve(size.pages)
        slot, reader = self.row_slot[:n], np.zeros(size.rows, np.int64)
        readers, order = np.bincount(slot), slot.argsort(kind="stable")
        # The rank of a row among the rows of its slot.
        reader[order] = np.arange(n) - (readers.cumsum() - readers)[slot[order]]
        grid = np.zeros((size.slots, size.readers), np.int64)
        grid[slot, reader[:n]] = np.arange(n)
        row, nth = self.pages[:n].nonzero()
        page = self.pages[row, nth]
        own_row, own_first = np.zeros(size.pages, np.int64), np.full(size.pages, self.width)
        own_row[page], own_first[page] = row, nth * PAGE
        return {"grid": grid, "reader": reader, "own_row": own_row, "own_first": own_first}


def cache_argument(base: torch.nn.Module) -> str:
    """Return how a model calls its cache: "cache" from transformers 5.24 on."""
    known = inspect.signature(type(base).forward).parameters
    return "cache" if "cache" in known else "past_key_values"

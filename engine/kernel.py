"""Compute the attention of a decoding step: with PyTorch, or on a GPU as one Triton kernel."""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .cache import CachedLayer

try:
    import triton
    import triton.language as tl
# Triton comes with PyTorch for GPUs.
except ImportError:
    triton = None


class KernelError(Exception):
    """Report that the fused attention cannot be built or run here."""


if triton:

    @triton.jit
    def _see(query, keys, values, seen, in_key, in_value, largest, total, mean):
        """Extend a softmax by a few keys, relative to the largest score so far (FlashAttention).

        query [Q, D]. keys, values: where they lie, [D, KEYS] and [KEYS, V]. seen [KEYS]. The
        state: largest [Q], total [Q], mean [Q, V].
        """
        key = tl.load(keys, mask=seen[None, :] & in_key[:, None], other=0.0)
        value = tl.load(values, mask=seen[:, None] & in_value[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(query, key, input_precision="ieee"), -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        weights, fade = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        mean = mean * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        return new, total * fade + tl.sum(weights, 1), mean

    @triton.jit(do_not_specialize=["window", "longest", "columns"])
    def _attend_and_store(
        query,
        new_key,
        new_value,
        prompt_keys,
        prompt_values,
        own_keys,
        own_values,
        slots,
        table,
        ages,
        starts,
        out,
        scale,
        window,
        longest,
        columns,
        QUERIES: tl.constexpr,
        WIDTH: tl.constexpr,
        VALUE_WIDTH: tl.constexpr,
        Q: tl.constexpr,
        D: tl.constexpr,
        V: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """Attend for one row and one key head, and store the row's new key and value.

        Tensors are as in `PagedCache` and `View`. Q, D and V: QUERIES, WIDTH and VALUE_WIDTH
        rounded up to the sizes of a matrix product. KEYS: tokens of a page, read at a time.
        """
        row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        q, d, v, k = tl.arange(0, Q), tl.arange(0, D), tl.arange(0, V), tl.arange(0, KEYS)
        in_key, in_value, at = d < WIDTH, v < VALUE_WIDTH, row * heads + head
        start, age, slot = tl.load(starts + row), tl.load(ages + row), tl.load(slots + row)
        queries = (at * QUERIES + q)[:, None]
        x = tl.load(
            query + queries * WIDTH + d[None, :],
            mask=(q < QUERIES)[:, None] & in_key[None, :],
            other=0.0,
        )
        x = (x.to(tl.float32) * scale).to(own_keys.dtype.element_ty)
        # The row's last token. From the next step on it is found in the cache.
        key = tl.load(new_key + at * WIDTH + d, mask=in_key, other=0.0).to(x.dtype)
        value = tl.load(new_value + at * VALUE_WIDTH + v, mask=in_value, other=0.0).to(x.dtype)
        page = tl.load(table + row * columns + age // KEYS) * heads + head
        tl.store(own_keys + (page * KEYS + age % KEYS) * WIDTH + d, key, mask=in_key)
        tl.store(own_values + (page * VALUE_WIDTH + v) * KEYS + age % KEYS, value, mask=in_value)
        largest = tl.sum(x.to(tl.float32) * key.to(tl.float32)[None, :], 1)
        total = tl.full([Q], 1.0, tl.float32)
        mean = tl.zeros([Q, V], tl.float32) + value.to(tl.float32)[None, :]
        for begin in range(tl.maximum(start + age - window + 1, 0) // KEYS * KEYS, start, KEYS):
            place = (slot * heads + head) * longest + begin + k
            keys = place[None, :] * WIDTH + d[:, None]
            values = place[:, None] * VALUE_WIDTH + v[None, :]
            seen = (begin + k < start) & (start + age - begin - k < window)
            largest, total, mean = _see(
                x,
                prompt_keys + keys,
                prompt_values + values,
                seen,
                in_key,
                in_value,
                largest,
                total,
                mean,
            )
        for begin in range(tl.maximum(age - window + 1, 0) // KEYS * KEYS, age, KEYS):
            page = tl.load(table + row * columns + begin // KEYS) * heads + head
            keys = (page * KEYS + k)[None, :] * WIDTH + d[:, None]
            values = (page * VALUE_WIDTH + v)[None, :] * KEYS + k[:, None]
            seen = (begin + k < age) & (age - begin - k < window)
            largest, total, mean = _see(
                x,
                own_keys + keys,
                own_values + values,
                seen,
                in_key,
                in_value,
                largest,
                total,
                mean,
            )
        shown = (q < QUERIES)[:, None] & in_value[None, :]
        tl.store(out + queries * VALUE_WIDTH + v[None, :], mean / total[:, None], mask=shown)


def fused_attention(
    query: torch.Tensor,
    key: CachedLayer,
    value: CachedLayer,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute a step of `paged_attention` in one kernel.

    query [rows, heads, head_dim] -> [rows, heads, value width]. Every row reads its whole prompt.
    Keys that many rows read come from the cache of the GPU.
    """
    cache, view = key.cache, key.cache.view
    prompts, own = cache.prompts.layers[key.layer], cache.own.layers[key.layer]
    (rows, heads, width), (_, key_heads, longest, value_width) = query.shape, prompts[1].shape
    sizes = heads // key_heads, width, value_width
    out = query.new_empty(rows, heads, value_width, dtype=own[1].dtype)
    _attend_and_store[rows, key_heads](
        query.contiguous(),
        key.new.contiguous(),
        value.new.contiguous(),
        *prompts,
        *own,
        view.slot,
        view.table.contiguous(),
        cache.ages,
        cache.starts,
        out,
        scaling or width**-0.5,
        1 << 30 if window is None else window,
        longest,
        view.table.shape[1],
        *sizes,
        *(max(16, 1 << (size - 1).bit_length()) for size in sizes),
        own[0].shape[2],
        num_warps=2 if max(width, value_width) <= 128 else 4,
        num_stages=1,
    )
    return out


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor):
    """Attend from several queries to the same keys, so that other keys can be merged in later.

    query [pages, key heads, queries, heads per key head, head_dim]. keys and values [pages,
    key heads, keys, head_dim]. Returns the mean of the values under softmax weights, shaped as
    query. Also returns the log of the sum of exp(scores) [..., 1].
    """
    scores = (query.flatten(2, 3) @ keys.mT).float().unflatten(2, query.shape[2:4]) + bias
    weights = scores.softmax(-1)
    mean = (weights.flatten(2, 3).to(values.dtype) @ values).unflatten(2, query.shape[2:4])
    # The largest weight is exp(largest score) / sum.
    return mean, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def paged_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    """Compute the attention of a layer. transformers calls it for models that use the engine.

    In decoding it stores the new keys and values. A prompt is read once for all the rows that
    sample from it. A row has several parts: its prompt and its own pages. They are merged by the
    weight of each part in the softmax over all parts. Outside of decoding it is the usual
    attention.
    """
    if not isinstance(key, CachedLayer):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with capped scores or sinks")
    if key.cache.fused:
        try:
            return fused_attention(query[:, :, 0], key, value, scaling, sliding_window)[
                :, None
            ], None
        # Triton passes on every exception of its compiler.
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise KernelError(str(error).strip().split("\n")[0]) from None
    cache, view, (prompt_bias, own_bias) = key.cache, key.cache.view, key.cache.bias(sliding_window)
    own_keys, own_values = cache.own.layers[key.layer]
    own_keys[cache.page, :, cache.place] = key.new.to(own_keys.dtype)
    own_values[cache.page, :, :, cache.place] = value.new.to(own_values.dtype)
    prompt_keys, prompt_values = (t[: len(view.grid)] for t in cache.prompts.layers[key.layer])
    own_keys, own_values = (t[: len(view.own_row)] for t in cache.own.layers[key.layer])
    rows, heads, _, head_dim = query.shape
    scaled = (
        (query[:, :, 0] * (scaling or head_dim**-0.5))
        .to(own_keys.dtype)
        .unflatten(1, (own_keys.shape[1], -1))
    )
    mean, weight = attend(
        take_rows(scaled, view.grid).transpose(1, 2), prompt_keys, prompt_values, prompt_bias
    )
    mean, weight = (
        t[view.slot, :, view.reader] for t in (mean, weight)
    )  # [rows, key heads, heads per key head, ...]
    own_mean, own_weight = attend(
        take_rows(scaled, view.own_row)[:, :, None], own_keys, own_values.mT, own_bias
    )
    own_mean, own_weight = (
        own_mean[:, :, 0],
        own_weight[:, :, 0],
    )  # [pages, key heads, heads per key head, ...]
    # Keys that a row does not see have weight exp(-1e30), for example all of page 0.
    total = torch.cat([weight[:, None], take_rows(own_weight, view.table)], 1).logsumexp(1)
    own = own_mean * (own_weight - take_rows(total, view.own_row)).exp()
    out = mean * (weight - total).exp() + take_rows(own, view.table).sum(1)
    return out.reshape(rows, 1, heads, -1).to(query.dtype), None


def take_rows(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return table[places]. On a CPU this is several times as fast as indexing."""
    return table.index_select(0, places.flatten()).unflatten(0, places.shape)


AttentionInterface.register("paged_attention", paged_attention)
AttentionMaskInterface.register("paged_attention", sdpa_mask)


def attention_masks(config, positions: torch.Tensor, length: int):
    """Return which of `length` tokens the queries at `positions` [rows, queries] see.

    The mask is boolean [rows, 1, queries, length]. If the model mixes full and sliding attention,
    there is one mask per kind of layer.
    """
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    full, window = distance >= 0, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of kind {sorted(kinds)}")
    if window is None or kinds == {"full_attention"}:
        return full
    sliding = full & (distance < window)
    return {"full_attention": full, "sliding_attention": sliding} if len(kinds) > 1 else sliding

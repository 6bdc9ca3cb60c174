"""`InferenceParams`: the keys and values of past tokens, kept so that generation computes only new ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from overdrive.functional.attention import dot_product_attention
from overdrive.functional.attention_mask import Mask, MaskKind
from overdrive.functional.kv_cache import attend, takes_few
from overdrive.functional.packing import Packing, Places, packing
from overdrive.modules.checks import default_device, one_of, positive_int, refuse
from overdrive.ops.kv_cache import append, attend_cached, cache_mask, places
from overdrive.ops.library import capturing

_NAME = "InferenceParams"

_FORMATS = ("sbhd", "bshd", "thd")


class InferenceParams:
    """A cache of keys and values for every layer that is given it as `inference_params`, by the layers' layer_number.

    Before each forward `pre_step({sequence: new tokens, ...})` says which sequences the batch holds, in its order, and how many
    tokens each adds; hidden_states then hold these first and padding after them, whose outputs mean nothing: of each sequence, or
    with "thd" of all, one after the other. Sequences left out have ended, and their memory is free. Masks with "causal" in their
    name let a query see its sequence up to itself, others all of it; padding follows from pre_step, so attention_mask and
    cu_seqlens_* are left out. Rotary angles must reach the longest sequence.

    max_batch_size, max_sequence_length: sequences at once, and tokens of each. num_heads_kv, head_dim_k, head_dim_v (head_dim_k
    unless given), dtype: of keys and values. is_paged: memory is dealt out in total_num_pages pages of page_size tokens, shared by
    all sequences, instead of max_sequence_length tokens for each. max_ctx_len: the most new tokens of a step. device: the current
    GPU where there is one. num_heads_q, head_dim_q, qkv_format and allow_query_conversion describe queries; Transformer Engine
    copies these, here nothing needs to know, and layers of all three formats may use the cache. ValueError or TypeError for what
    does not fit, NotImplementedError for custom_cache_manager.

    Lengths are on the device and shapes constant, so a CUDA graph may capture a forward; pre_step, which writes the lengths, is
    called outside, before each replay.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        num_heads_kv: int = 16,
        head_dim_k: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        head_dim_v: int | None = None,
        is_paged: bool = False,
        total_num_pages: int | None = None,
        page_size: int | None = None,
        num_heads_q: int = 16,
        head_dim_q: int = 64,
        max_ctx_len: int | None = None,
        qkv_format: str = "bshd",
        custom_cache_manager: Any = None,
        allow_query_conversion: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        refuse(_NAME, {"custom_cache_manager": (custom_cache_manager, None)}, "not built yet")
        one_of(_NAME, "qkv_format", qkv_format, _FORMATS)
        self.max_batch_size = positive_int(_NAME, "max_batch_size", max_batch_size)
        self.max_sequence_length = positive_int(_NAME, "max_sequence_length", max_sequence_length)
        self.num_heads_kv = positive_int(_NAME, "num_heads_kv", num_heads_kv)
        self.head_dim_k = positive_int(_NAME, "head_dim_k", head_dim_k)
        self.head_dim_v = head_dim_k if head_dim_v is None else positive_int(_NAME, "head_dim_v", head_dim_v)
        self.max_ctx_len = max_sequence_length if max_ctx_len is None else positive_int(_NAME, "max_ctx_len", max_ctx_len)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{_NAME}: dtype must be a floating-point torch.dtype, got {dtype!r}")
        self.dtype, self.device = dtype, default_device(device)
        self.is_paged = is_paged
        for name, value in (("total_num_pages", total_num_pages), ("page_size", page_size)):
            if is_paged:
                positive_int(_NAME, name, value)
            elif value is not None:
                raise ValueError(f"{_NAME}: {name}={value} goes with is_paged=True only; set that or leave it out")
        self.page_size = page_size if is_paged and page_size else max_sequence_length
        self.total_num_pages = total_num_pages if is_paged and total_num_pages else max_batch_size
        pages = -(-max_sequence_length // self.page_size)
        width = -(-max_batch_size // 4) * 4  # rows that begin at multiples of 16 bytes
        self._host = torch.zeros(2 + pages, width, dtype=torch.int32)  # rows: cached tokens, new tokens, then page numbers
        with torch.inference_mode(False):
            self._lengths = torch.zeros_like(self._host, device=self.device)
        self._caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all sequences; memory stays allocated."""
        self.sequences: OrderedDict[Any, int] = OrderedDict()
        self.sequences_pre_step: OrderedDict[Any, int] = OrderedDict()
        self._pages: dict[Any, list[int]] = {}
        self._free = list(range(self.total_num_pages))
        self._appended: set[int] = set()
        self._plans: dict[Any, Any] = {}
        self._largest_step = self._longest = self._new = self._prompt = 0
        self._host.zero_()
        self._lengths.zero_()
        self._clear(self._free)

    def allocate_memory(self, layer_number: int) -> None:
        """Make the cache of a layer, unless it is there; `step` does so too, so that this only chooses the time."""
        if layer_number in self._caches:
            return
        rows, heads = self.total_num_pages * self.page_size + 1, self.num_heads_kv
        with torch.inference_mode(False):  # a tensor made in inference mode could be written in it only
            key, value = (
                torch.zeros(rows, heads, width, dtype=self.dtype, device=self.device)
                for width in (self.head_dim_k, self.head_dim_v)
            )
        self._caches[layer_number] = key, value

    def pre_step(self, step_dict: Mapping[Any, int]) -> None:
        """Begin a step: sequence -> number of new tokens, in the order of the batch; those known but left out have ended.

        ValueError where the cache overflows: too many sequences, too long a one, no page left. Nothing has changed then.
        """
        cached = OrderedDict((sequence, self.sequences.get(sequence, 0)) for sequence in step_dict)
        self._check_step(step_dict, cached)
        ended = [page for sequence in self._pages.keys() - step_dict.keys() for page in self._pages.pop(sequence)]
        self._clear(ended)
        self._free = sorted(self._free + ended)
        changed = bool(ended) or list(self._pages) != list(step_dict)
        self.sequences_pre_step = cached
        self.sequences = OrderedDict((sequence, cached[sequence] + new) for sequence, new in step_dict.items())
        self._pages = {sequence: self._pages.get(sequence, []) for sequence in step_dict}
        for sequence, length in self.sequences.items():
            while len(self._pages[sequence]) < self._pages_for(length):
                self._pages[sequence].append(self._free.pop(0))
                changed = True
        if changed:
            self._order()
        self._host[:2] = 0
        self._host[:2, : len(cached)] = torch.tensor([list(cached.values()), list(step_dict.values())], dtype=torch.int32)
        self._lengths.copy_(self._host, non_blocking=True)  # from pageable memory, which is staged before the call returns
        self._largest_step = max(step_dict.values(), default=0)
        self._longest = max(self.sequences.values(), default=0)
        self._new = sum(step_dict.values())
        every_begins = min(step_dict.values(), default=0) == self._longest
        self._prompt = self._longest if every_begins else 0
        self._appended, self._plans = set(), {}

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size) if self.is_paged else 1

    def _check_step(self, step_dict: Mapping[Any, int], cached: Mapping[Any, int]) -> None:
        if len(step_dict) > self.max_batch_size:
            raise ValueError(
                f"{_NAME}: step_dict has {len(step_dict)} sequences, the cache was made with max_batch_size={self.max_batch_size}"
            )
        for sequence, new in step_dict.items():
            if isinstance(new, bool) or not isinstance(new, int) or not 0 <= new <= self.max_ctx_len:
                raise ValueError(
                    f"{_NAME}: step_dict[{sequence!r}] must be a number of new tokens from 0 to max_ctx_len={self.max_ctx_len}, "
                    f"got {new!r}"
                )
            if cached[sequence] + new > self.max_sequence_length:
                raise ValueError(
                    f"{_NAME}: the cache overflows: sequence {sequence!r} has {cached[sequence]} tokens and step_dict adds {new}, "
                    f"over max_sequence_length={self.max_sequence_length}; make it larger, or end the sequence"
                )
        wanted = sum(self._pages_for(cached[sequence] + new) for sequence, new in step_dict.items())
        if wanted > self.total_num_pages:
            raise ValueError(
                f"{_NAME}: the cache overflows: the sequences of step_dict need {wanted} pages of {self.page_size} tokens, there "
                f"are total_num_pages={self.total_num_pages}; make it larger, or end a sequence"
            )

    def _order(self) -> None:
        """Write the page table; in a contiguous cache sequence i of the batch moves to page i, so that attention reads a view."""
        count = len(self._pages)
        if not self.is_paged:
            held = [page for pages in self._pages.values() for page in pages]
            if held != list(range(count)):
                source = torch.tensor([*held, *self._free], device=self.device)
                for cache in self._tensors():
                    cache.copy_(cache[source])
                self._pages = {sequence: [page] for page, sequence in enumerate(self._pages)}
                self._free = list(range(count, self.max_batch_size))
        for index, pages in enumerate(self._pages.values()):
            own = pages + pages[:1] * (len(self._host) - 2 - len(pages))  # never another's, whose NaNs could be read
            self._host[2 : 2 + len(own), index] = torch.tensor(own, dtype=torch.int32)

    def _clear(self, pages: list[int]) -> None:
        """Zeros for the next owner: masked scores are 0, and 0 times a NaN that was left there would be NaN."""
        if pages:
            for cache in self._tensors():
                cache[torch.tensor(pages, device=self.device)] = 0

    def _tensors(self) -> list[torch.Tensor]:
        """Every cache as [pages, page_size, heads, channels]."""
        return [self._as_pages(cache) for pair in self._caches.values() for cache in pair]

    def _as_pages(self, cache: torch.Tensor) -> torch.Tensor:
        return cache[:-1].unflatten(0, (self.total_num_pages, self.page_size))

    def get_seqlens_pre_step(self) -> torch.Tensor:
        """i32 [sequences]: how many tokens each sequence of the batch had before this step; the position of its first new one."""
        return self.start_positions(len(self.sequences))

    def start_positions(self, batch: int) -> torch.Tensor:
        """As get_seqlens_pre_step, for a batch that may have rows of padding after its sequences."""
        return self._of_batch(batch)[0]

    def places(self, batch: int | None) -> Places:
        """Where the new tokens stand, of a batch of so many rows, or, if None, packed."""
        if batch is not None:
            return Places(self._longest, self.start_positions(batch))
        return Places(self._longest, self.start_positions(self._rows), self._cu_seqlens())

    @property
    def _rows(self) -> int:
        """Of the batch that packed tokens are padded to; one even of no sequences."""
        return max(len(self.sequences), 1)

    def _cu_seqlens(self) -> torch.Tensor:
        """i32 [rows + 1]: where among the packed new tokens each sequence's begin, and the last one's end."""
        new = self._lengths[1, : self._rows]
        return self._planned("cu_seqlens", lambda: torch.nn.functional.pad(new.cumsum(0, dtype=torch.int32), (1, 0)))

    def packing_of(self, tokens: int) -> Packing:
        """How the new tokens lie among `tokens` packed ones."""
        longest = max(self._largest_step, 1)
        return self._planned(("packing", tokens), lambda: packing(self._cu_seqlens(), None, longest, tokens))

    def step(
        self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Append a layer's new keys and values, [S, B, heads, channels], [B, S, heads, channels] or [T, heads, channels].

        Returns (keys, values, page table): the cache itself, [max_batch_size, max_sequence_length, heads, channels] and None, or
        [total_num_pages, page_size, heads, channels] and i32 [B, pages per sequence] if is_paged. B may exceed the sequences of
        pre_step: what is left is padding. Once for each layer after each pre_step, else RuntimeError.
        """
        layout = one_of(_NAME, "qkv_format", qkv_format, _FORMATS)
        caches, new_k, new_v = self._begin(layer_number, new_k, new_v, layout)
        batch_first = layout != "sbhd"
        batch, new = new_k.shape[:2] if batch_first else (new_k.shape[1], new_k.shape[0])
        starts, steps, table = self._of_batch(batch)
        rows = self._planned(
            ("places", batch, new),
            lambda: places(starts, steps, table, self.page_size, new, self.total_num_pages * self.page_size),
        )
        for cache, x in zip(caches, (new_k, new_v)):
            append(cache, rows, x, batch_first)
        key, value = (self._as_pages(cache) for cache in caches)
        return key, value, table if self.is_paged else None

    def attend_few(
        self,
        layer_number: int,
        query: torch.Tensor,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        layout: str,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        """`step`, and the attention of these tokens to all of their sequences; see ops.kv_cache.attend_cached."""
        caches, new_k, new_v = self._begin(layer_number, new_k, new_v, layout)
        packed = self.packing_of(query.shape[0]) if layout == "thd" else None
        query, batch_first = query if packed is None else packed.pad(query), layout != "sbhd"
        batch = query.shape[0 if batch_first else 1]
        out = attend_cached(query, new_k, new_v, *caches, *self._of_batch(batch), self.page_size, batch_first, causal, scale)
        return out if packed is None else packed.pack(out)

    def new_tokens(self, query: torch.Tensor, layout: str) -> int:
        """How many of a sequence there may be in `query`."""
        return self._largest_step if layout == "thd" else query.shape[layout.index("s")]

    def _begin(
        self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, layout: str
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
        """A layer's cache, and what will be appended to it: packed tokens padded."""
        self._check_new(layer_number, new_k, new_v, layout)
        self._appended.add(layer_number)
        self.allocate_memory(layer_number)
        if layout == "thd":
            packed = self.packing_of(new_k.shape[0])
            new_k, new_v = packed.pad(new_k), packed.pad(new_v)
        return self._caches[layer_number], new_k, new_v

    def _of_batch(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(cached tokens i32 [B], new tokens i32 [B], page table i32 [B, pages]): views that show the lengths of every step."""
        views = None if torch.compiler.is_compiling() else self._views.get(batch)
        if views is None:
            views = self._lengths[0, :batch], self._lengths[1, :batch], self._lengths[2:, :batch].t()
            if not torch.compiler.is_compiling():
                self._views[batch] = views
        return views

    def begins(self, batch: int, new: int) -> bool:
        """Whether `batch` sequences of `new` tokens each have nothing else: False for what may run with other lengths later."""
        if torch.compiler.is_compiling() or capturing(self.device):
            return False
        return batch == len(self.sequences) and new == self._prompt

    def _planned(self, key: Any, make: Any) -> Any:
        """What all layers of a step share, made by the first; a graph that is captured makes its own, to renew it at replay."""
        if torch.compiler.is_compiling():  # the compiler finds what is the same
            return make()
        key = (key, capturing(self.device))
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def mask(self, batch: int, new: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The (mask, dead) of ops.kv_cache.cache_mask for `batch` sequences of `new` tokens."""
        keys = (len(self._host) - 2) * self.page_size
        return self._planned(("mask", batch, new, causal), lambda: cache_mask(*self._of_batch(batch)[:2], new, keys, causal))

    def convert_paged_to_nonpaged(self, layer_number: int, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's (keys, values) as [batch, places, heads, channels], places >= max_sequence_length: copies of a paged cache's
        pages, views of a contiguous cache. batch: the sequences of pre_step unless given.
        """
        batch = len(self.sequences) if batch is None else batch
        key, value = (self._as_pages(cache) for cache in self._caches[layer_number])
        if not self.is_paged:
            return key[:batch], value[:batch]
        table = self._of_batch(batch)[2]
        return key[table].flatten(1, 2), value[table].flatten(1, 2)

    def _check_new(self, layer_number: Any, new_k: torch.Tensor, new_v: torch.Tensor, layout: str) -> None:
        positive_int(_NAME, "layer_number", layer_number)
        if layer_number in self._appended:
            raise RuntimeError(
                f"{_NAME}: layer_number={layer_number} has appended its tokens of this step already; call pre_step before each "
                "forward, and give every layer a layer_number of its own"
            )
        for name, x, width in (("new_k", new_k, self.head_dim_k), ("new_v", new_v, self.head_dim_v)):
            fits = x.dim() == len(layout) and x.shape[:-2] == new_k.shape[:-2]
            if not fits or x.shape[-2:] != (self.num_heads_kv, width):
                raise ValueError(
                    f"{_NAME}: {name} must be [{', '.join(layout[:-2])}, num_heads_kv={self.num_heads_kv}, {width}], as the cache "
                    f"was made; got {list(x.shape)}"
                )
            if x.dtype != self.dtype or x.device != self.device:
                raise TypeError(
                    f"{_NAME}: {name} is {x.dtype} on {x.device}, the cache was made with dtype={self.dtype} on {self.device}; "
                    "make it with the layers' own"
                )
        if layout == "thd":
            if new_k.shape[0] < self._new:
                raise ValueError(f"{_NAME}: pre_step was told of {self._new} new tokens, there are {new_k.shape[0]} packed ones")
            return
        batch, new = new_k.shape[:2] if layout == "bshd" else (new_k.shape[1], new_k.shape[0])
        if not len(self.sequences) <= batch <= self.max_batch_size:
            raise ValueError(
                f"{_NAME}: the batch has {batch} sequences; it must have the {len(self.sequences)} that pre_step was told of, or "
                f"more, up to max_batch_size={self.max_batch_size}"
            )
        if new < self._largest_step:
            raise ValueError(
                f"{_NAME}: pre_step was told of a sequence with {self._largest_step} new tokens, the batch has {new} for each"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": {}}  # a copy has lengths of its own

    def __repr__(self) -> str:
        return (
            f"{_NAME}(max_batch_size={self.max_batch_size}, max_sequence_length={self.max_sequence_length}, "
            f"is_paged={self.is_paged}, sequences={len(self.sequences)})"
        )


def _check_type(module: str, inference_params: Any) -> None:
    if not isinstance(inference_params, InferenceParams):
        raise TypeError(f"{module}: inference_params must be an InferenceParams, got {type(inference_params).__name__}")


def cached_places(module: str, inference_params: Any, batch: int | None) -> Places:
    """InferenceParams.places."""
    _check_type(module, inference_params)
    return inference_params.places(batch)


def attend_to_cache(
    module: str,
    layer_number: int | None,
    inference_params: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    kind: MaskKind,
    layout: str,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Append K and V to the layer's cache, and attend to all of it: [S, B, H, D], [S, B, G, D], [S, B, G, E] -> [S, B, H * E], or
    whatever `layout` puts in place of S and B.
    """
    _check_type(module, inference_params)
    if layer_number is None:
        raise ValueError(f"{module}: inference_params keeps a cache per layer, and this one has no layer_number; give it one")
    if kind.arbitrary or kind.left >= 0 or kind.right >= 0:
        raise NotImplementedError(f"{module}: inference_params with such a mask is not built yet; use 'causal' or 'no_mask'")
    if attention_mask is not None:
        raise ValueError(f"{module}: attention_mask came, but inference_params knows from pre_step what is padding; leave it out")
    if dropout or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        what = "dropout is" if dropout else "gradients are"
        raise RuntimeError(f"{module}: inference_params is for inference, but {what} on; use .eval() and torch.no_grad()")
    if layout == "thd" and query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{module}: query_layer and key_layer must have as many tokens with inference_params, got {query.shape[0]} and "
            f"{key.shape[0]}"
        )
    if takes_few(inference_params.new_tokens(query, layout), query.shape[-2], key.shape[-2]):
        return inference_params.attend_few(layer_number, query, key, value, layout, kind.causal, scale)
    inference_params.step(layer_number, key, value, layout)
    packed = inference_params.packing_of(query.shape[0]) if layout == "thd" else None
    query, batch_first = query if packed is None else packed.pad(query), layout != "sbhd"
    batch, new = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
    if inference_params.begins(batch, new):
        key, value = (key, value) if packed is None else (packed.pad(key), packed.pad(value))
        out = dot_product_attention(query, key, value, None, kind._replace(padding=False), batch_first, scale=scale)
    else:
        keys, values = inference_params.convert_paged_to_nonpaged(layer_number, batch)
        mask, dead = inference_params.mask(batch, new, kind.causal)
        out = attend(query, keys, values, mask, dead, batch_first, scale)
    return out if packed is None else packed.pack(out)

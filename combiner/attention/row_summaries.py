"""The summaries of `combiner_axial_rowmajor`: a grid row as each of its own tokens sees it.

Letters: as in `layout`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner import reference
from combiner.attention.joint import dot, softmax
from combiner.attention.layout import Summary, mask_own, merge, split


def look_along_rows(
    own: Float[Array, 'h m c c'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    key: str | Callable[[Array], Array],
    size: int,
    members: Bool[Array, 'm c'] | None = None,
) -> Summary:
    """Every row's summary, of its `members`, as seen from each cell of its grid of `size` cells.

    `own` are the logits inside rows. A cell that is no member counts as a zero query and a zero key.
    """
    if members is not None:
        own, k = jnp.where(members[..., None], own, 0), jnp.where(members[..., None], k, 0)
    local = softmax(mask_own(own, causal=False, inside=members)).astype(v.dtype)
    span_v = dot('hmqk,hmkd->hmqd', local, v).astype(v.dtype)
    if key == 'token':
        return Summary(k, span_v)
    if key == 'attended':
        return Summary(dot('hmqk,hmkd->hmqd', local, k).astype(k.dtype), span_v)
    if not isinstance(key, str):
        return Summary(split(key(merge(span_v, size)), k.shape[2]), span_v)
    raise ValueError(f'unknown summary key {key!r}; choose {", ".join(reference.KEYS)} or, in a module, projected')

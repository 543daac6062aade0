"""The summaries of `combiner_axial_rowmajor`, a grid row as each of its own tokens sees it, and attention to them.

Letters: as in `layout`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.attention.joint import Drop, dot, joint_softmax, masked, softmax
from combiner.attention.layout import Summary, mask_own, merge, split, split_labels, split_valid, transpose_grid
from combiner.attention.views import views


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


def attend_rows(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
    *,
    columns: int,
    causal: bool,
    key: str | Callable[[Array], Array],
    drop: Drop | None,
) -> Float[Array, 'b l h d']:
    """`attend_combiner_axial_rowmajor`, all at once."""
    batch, length = q.shape[:2]
    inside = split_valid(valid, batch, length, columns, causal=causal)
    segments = None if segments is None else split_labels(segments, columns)
    q, k, v = (split(x, columns) for x in (q * q.shape[-1] ** -0.5, k, v))
    rows = q.shape[1] // batch
    seen_as = views(batch, rows, causal=causal, inside=inside, segments=segments)
    own = dot('hmqd,hmkd->hmqk', q, k)
    spans = [look_along_rows(own, k, v, key, rows * columns, view.members) for view in seen_as]
    span_k, span_v = (jnp.concatenate([transpose_grid(span[i], rows) for span in spans], axis=2) for i in range(2))

    far = transpose_grid(dot('hknd,hkrd->hknr', transpose_grid(q, rows), span_k), columns)
    far = masked(far, jnp.concatenate([view.seen for view in seen_as], axis=-1))
    own = mask_own(own, causal=causal, inside=inside, segments=segments)
    own, far = (group if drop is None else drop(group) for group in joint_softmax(own, far))
    attended = dot('hmqk,hmkd->hmqd', own.astype(v.dtype), v)
    from_rows = dot('hknr,hkrd->hknd', transpose_grid(far.astype(v.dtype), rows), span_v)
    return merge((attended + transpose_grid(from_rows, columns)).astype(v.dtype), length)

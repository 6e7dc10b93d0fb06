"""Pictures of masks, positions and attention, drawn with matplotlib.

What relates queries to keys has two views. The matrix, one line per query and one column per key: ``mask``, ``bias``, ``rotation``,
``attention``. And one query's line of it, drawn where the keys are - on cells of a grid, nodes of a graph, points of a plane, moments of
a timeline: ``mask_on``, ``bias_on``, ``rotation_on``, ``attention_on``. ``embedding`` shows what is added to tokens,
``attention_on_image`` attention over the image that it is of.

Every function draws on the axes ``ax``, or on a new figure if there are none, and returns the axes. ``row`` and ``head`` choose a row of
the batch and a head, where these differ. Pictures are for small domains: matrices are Tq x Tk, and the layout of a graph needs the hop
distances of all its nodes.

matplotlib comes with the extra ``xformerlib[plot]``, and is imported when the first picture is drawn.
"""

from ._images import attention_on_image as attention_on_image
from ._relations import (
    attention as attention,
    attention_on as attention_on,
    bias as bias,
    bias_on as bias_on,
    embedding as embedding,
    mask as mask,
    mask_on as mask_on,
    rotation as rotation,
    rotation_on as rotation_on,
)

"""Drawn faces: synthetic portraits with exact 19-class masks for tests, tutorials and the demo; nothing to download.

A face has a geometry (pose, head, hair style, glasses, ...) and an appearance (colours, light, patterns), drawn from
two independent random streams, so one mask has as many images as there are appearances. All lengths are in units of
the picture's side, so an index is the same face at every size.

Each part is a signed distance field on the pixel grid, negative inside. The same field gives the hard label and the
soft edge of the image, so the edges in the image lie where the mask says.

The layout follows real masks: the median area of every class is close to that of 808 CelebAMask-HQ masks (the table
is in the tests). So is the frequency of the parts, except that hats, glasses and necklaces (5 % each there) have 7 to
9 % here, so that a few thousand faces hold enough of them to learn from.
"""

from ssmgen.data.drawn_faces.geometry import DRAWN_FACES_VERSION
from ssmgen.data.drawn_faces.portrait import DrawnFaces, draw_face, write_official_layout
from ssmgen.data.drawn_faces.words import ATTRIBUTES, attributes_of, sentence, words_of

__all__ = [
    "ATTRIBUTES",
    "DRAWN_FACES_VERSION",
    "DrawnFaces",
    "attributes_of",
    "draw_face",
    "sentence",
    "words_of",
    "write_official_layout",
]

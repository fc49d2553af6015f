"""Data sets of image-mask pairs, label sets, paired transforms, and drawn faces that need no download."""

from ssmgen.data.balance import class_weights, loss_weights, repeats
from ssmgen.data.buckets import aspect_buckets, check_buckets, frequent_buckets
from ssmgen.data.contrasts import mirrored_contrasts
from ssmgen.data.drawn_faces import DrawnFaces, draw_face
from ssmgen.data.folder import PreparedFolder
from ssmgen.data.images import read_image, read_mask, write_png
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, check_labels, remap
from ssmgen.data.latent_cache import LatentCache, cache_record, rebuild_latent_cache, write_latent_cache
from ssmgen.data.mask_input import LABEL_SETS, to_labels
from ssmgen.data.merge import MergeTable, distinct_colours, read_merge_table
from ssmgen.data.pairs import Crops, PairFolder, Pairs
from ssmgen.data.shards import CacheError
from ssmgen.data.texts import WithTexts
from ssmgen.data.transforms import center_crop_resize, center_crop_resize_mask, crop_resize, flip_pair

__all__ = [
    "BISENET19",
    "CELEBAMASK19",
    "CacheError",
    "Crops",
    "DrawnFaces",
    "LABEL_SETS",
    "LabelSet",
    "LatentCache",
    "MergeTable",
    "PairFolder",
    "Pairs",
    "PreparedFolder",
    "WithTexts",
    "aspect_buckets",
    "cache_record",
    "center_crop_resize",
    "center_crop_resize_mask",
    "check_buckets",
    "check_labels",
    "class_weights",
    "crop_resize",
    "distinct_colours",
    "draw_face",
    "flip_pair",
    "frequent_buckets",
    "loss_weights",
    "mirrored_contrasts",
    "read_image",
    "rebuild_latent_cache",
    "read_mask",
    "read_merge_table",
    "remap",
    "repeats",
    "to_labels",
    "write_latent_cache",
    "write_png",
]

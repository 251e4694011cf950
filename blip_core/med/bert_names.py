"""The names of transformers' BertForMaskedLM, whose self-attention becomes that of every face.

BLIP's text transformer is BERT's with cross-attention and without token types; what else has no place in it, BERT's
pooler and next-sentence head, belongs to objectives of BERT's own.
"""

from blip_core.med.names import Line, NameTable
from blip_core.med.release_names import DECODER, ENCODER, POSITION_IDS, SHARED

EMBEDDINGS_AND_FEED_FORWARD = tuple(line for line in SHARED if "cross_attention" not in line[0])
SELF_ATTENTION = tuple(line for line in ENCODER if "self_attention" in line[0])


def _of_bert(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    return tuple((ours, theirs.replace("text_decoder.cls.", "cls.")) for ours, theirs in lines)


BERT = NameTable(
    image=(),
    shared=EMBEDDINGS_AND_FEED_FORWARD,
    faces={"encoder": SELF_ATTENTION, "decoder": _of_bert(DECODER)},
    roots={"encoder": "bert", "decoder": "bert"},
    copies=("cls.predictions.decoder.bias", "cls.predictions.decoder.weight"),
    left_out=(
        POSITION_IDS,
        "T.embeddings.token_type_embeddings.weight",
        "T.pooler.dense.weight",
        "T.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
)

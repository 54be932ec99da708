"""Is the person hidden? Acceptance, similarity, re-identification and distance of anonymized faces."""

from __future__ import annotations

from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import Measured


def false_matches(faces: Embeddings) -> Measured:
    """``fmr``: of other people's originals, the share that the judge takes for this person (ISO/IEC 19795-1).

    Where the threshold was calibrated on another set, that is not one in a thousand. A stranger's face would be
    accepted as often, and so would one that a key drew by chance. Its interval resamples one side of the pairs.
    """
    strangers = None if faces.threshold is None else faces.meeting("original").strangers
    if faces.people < 2:
        return faces.measured("fmr", "original", None, None, why="only one person")
    return faces.measured("fmr", "original", None, strangers)


def anonymity(faces: Embeddings) -> list[Measured]:
    """Figures of the anonymized leg, and :func:`false_matches`.

    - ``tar@far=1e-3``: share still accepted as the original person, against the very picture and against that
      person's other pictures (mean over them, people with two or more only).
    - ``similarity``: its mean, against both.
    - ``rank1``: share whose nearest original in the set's gallery is that person's; ``other-image`` leaves
      the very picture out of the gallery.
    - ``id_distance``: how far the similarity falls below that of a picture with itself (1 - cosine, or the
      Euclidean distance for a judge that measures one).
    """
    if "anonymized" not in faces.pictures:
        return []
    meeting = faces.meeting("anonymized")
    figures = faces.acceptance("anonymized", "anonymized")
    figures.append(false_matches(faces))
    distance = faces.paired("original", "original") - meeting.same
    figures.append(faces.measured("id_distance", "anonymized", "same-image", distance))
    if faces.people < 2:
        why = "one person, or no identity labels"
        references = ("same-image", "other-image")
        return figures + [faces.measured("rank1", "anonymized", word, None, why=why) for word in references]
    with_others = meeting.rank1_other.float().masked_fill(meeting.other.isnan(), float("nan"))
    figures.append(faces.measured("rank1", "anonymized", "same-image", meeting.rank1.float()))
    figures.append(faces.measured("rank1", "anonymized", "other-image", with_others))
    return figures

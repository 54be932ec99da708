"""What each figure of a report is called, and what it means in one line."""

from __future__ import annotations

from typing import NamedTuple

from lightning_modules.protocol import OWN


class Entry(NamedTuple):
    """Title for the head of a column, and an explanation for somebody who has not read the protocol."""

    title: str
    meaning: str


GLOSSARY: dict[str, Entry] = {
    "tar@far=1e-3": Entry(
        "accepted",
        "Share of faces that a recogniser takes for the original person, at a threshold where it takes one "
        "in a thousand pairs of strangers for the same person (TAR at a FAR of 0.1 %).",
    ),
    "fmr": Entry(
        "false matches",
        "Of the originals of other people in this data set, the share that a recogniser takes for the same person "
        "(FMR): a stranger's face would be accepted as often.",
    ),
    "tar_worst_bit": Entry(
        "accepted, worst bit",
        "The same share for the one wrong bit that guards least, of the bits that were tried in every face; "
        "these are all bits of the key only where as many wrong keys were tried.",
    ),
    "similarity": Entry(
        "similarity",
        "Mean similarity of a recogniser's embeddings, higher is more alike: the cosine, or the negative "
        "distance where it measures one.",
    ),
    "rank1": Entry(
        "rank-1",
        "Share of faces whose nearest original in the whole test gallery is a picture of the same person.",
    ),
    "id_distance": Entry(
        "identity distance",
        "How far the similarity falls below that of a picture with itself.",
    ),
    "psnr": Entry("PSNR (dB)", "Peak signal-to-noise ratio to the original; identical pictures count as 100 dB."),
    "ssim": Entry("SSIM", "Structural similarity to the original, 1 for identical pictures."),
    "ms_ssim": Entry("MS-SSIM", "SSIM over several scales; comparable only at one picture size."),
    "lpips": Entry("LPIPS", "Perceptual distance to the original by AlexNet features, 0 for identical pictures."),
    "pieapp": Entry("PieAPP", "Perceptual distance to the original, learned from people's preferences."),
    "fid": Entry(
        "FID",
        "Distance between the distributions of Inception features of all faces and all originals; biased upwards at "
        "few faces, so compare it only at one number of faces.",
    ),
    "kid": Entry("KID", "As FID, with a kernel estimate that few faces do not bias."),
    "fd_face": Entry(
        "FD (face)",
        "Fréchet distance over a face recogniser's features; not an FID, and like it biased upwards at few faces.",
    ),
    "fd_efflite0": Entry(
        "FD (EfficientNet)",
        "Fréchet distance over EfficientNet-lite0 features; not an FID, and like it biased upwards at few faces.",
    ),
    "lpips_squeeze_caffe": Entry(
        "LPIPS (SqueezeNet)",
        "Perceptual distance by SqueezeNet features; not comparable with LPIPS by AlexNet.",
    ),
    "bit_exact": Entry("bit-exact", "Share of recovered pictures equal to the original in every grey level."),
    "diversity": Entry(
        "diversity", "Share of faces that, anonymized under two keys, a recogniser takes for two people."
    ),
    "diversity_distance": Entry(
        "distance to strangers",
        "How far a face under two keys is from as unlike as two people are (Wasserstein, in the judge's similarity).",
    ),
    "unlinkability_dsys": Entry(
        "linkability D_sys",
        "How well two pictures of a person under two keys can be linked: 0 not at all, 1 always.",
    ),
    "detected": Entry("detected", "Of the faces that a detector finds in the originals, the share still found."),
    "box_shift": Entry("box shift", "How far the centre of the detected face moves, in eye distances."),
    "landmark_shift": Entry("landmark shift", "How far eyes, nose and mouth corners move, in eye distances."),
    "pose_deg": Entry("pose (°)", "Change of the head's pose in degrees."),
    "expression_agree": Entry("expression kept", "Share of faces whose recognised expression stays the same."),
    "eyes_agree": Entry("eyes kept", "Share of faces whose eyes stay open, or closed."),
    "gender_agree": Entry("gender kept", "Share of faces whose estimated gender stays the same."),
    "age_mae": Entry("age error", "Mean change of the estimated age, in years."),
    "attribute_agree": Entry("attributes kept", "Share of three guessed attributes that stay: gender, age, a smile."),
    "background_shift": Entry("background shift", "Change of colour well outside the face, in shares of white."),
    "seam": Entry("seam", "How much more edges grew where a mask of the face ends than beside it; 0 is none."),
    "eye_shift": Entry("eye change", "Change of colour in the region of the eyes."),
    "hair_shift": Entry("hair change", "Change of colour in the region of the hair."),
    "known_plaintext@N": Entry(
        "known plaintext",
        "Share accepted after an attacker undid it who holds N pairs of original and anonymized face, but no key.",
    ),
    "known_person": Entry(
        "known person",
        "Share of faces as which another picture of that person is accepted as it is: what an attacker who knows some "
        "originals of a shared key has before undoing anything.",
    ),
    "key_guess_auc": Entry(
        "key guessing (AUC)",
        "How well the right key can be told from wrong ones without the original; 0.5 is chance.",
    ),
    "inverter_tar": Entry(
        "trained inverter",
        "Share accepted after a network that was trained on pairs, without the key, undid it; to be read beside the "
        "share accepted of the anonymized faces themselves.",
    ),
    "adaptive_tar": Entry(
        "adapted judge",
        "Share accepted by a recogniser that learned from pairs, by moving its embeddings or by training its network.",
    ),
    "tar_gap": Entry(
        "gap in acceptance", "Between the group of people with the most faces accepted and that with the fewest."
    ),
    "detected_gap": Entry(
        "gap in detection", "Between the group of people with the most faces still detected and that with the fewest."
    ),
    "flops": Entry("FLOPs", "Floating-point operations for one face."),
    "params": Entry("parameters", "Numbers in all networks of the method, frozen ones included."),
    "images_per_s": Entry("faces/s", "Faces per second of the method alone, without files, on the machine of the run."),
    "peak_memory": Entry("peak memory", "Most memory held at once, in bytes."),
    "overhead": Entry("overhead", "Time of a whole comparison over that of its methods and judges; 1 is none."),
    "peak_share": Entry(
        "of peak", "FLOPs a second over the most that this machine reached in a product or a convolution."
    ),
    "plain_share": Entry(
        "of plain loop",
        "FLOPs a second of training over those of the same networks forward and backward without losses, optimizers "
        "and trainer.",
    ),
    "data_wait": Entry(
        "data wait", "Share of a training's time that goes by between steps, in which the next faces are fetched."
    ),
    "scaling": Entry("scaling", "Faces per second of several processes that train, over those of one."),
    "memory_growth": Entry("memory growth", "Bytes by which the memory of a training grows with each step."),
}
"""One entry for each name of :data:`lightning_modules.protocol.METRICS`."""

LEGS = {
    "original": "originals",
    "anonymized": "anonymized",
    "recovered": "recovered",
    "wrongly_recovered": "opened with a wrong key",
    "inverted": "inverted (no key)",
    "attacked": "attacked",
}
"""How a leg of the protocol is called in a table."""

REFERENCES = {
    "same-image": "against the very picture that was anonymized",
    "other-image": "against other pictures of that person (people with two or more only)",
    "other-key": "against the same picture anonymized under another key",
}
"""What a face is compared with."""


def metric_word(metric: str) -> str:
    """Name of a metric in :data:`GLOSSARY`: ``known_plaintext@N`` for any number of pairs."""
    return "known_plaintext@N" if metric.startswith("known_plaintext@") else metric


def entry(metric: str) -> Entry:
    """Title and meaning of a metric; the title of ``known_plaintext@10`` says its number of pairs."""
    if metric.startswith(OWN):
        return Entry(metric[len(OWN) :].replace("_", " "), "Not of the protocol: the comparison's file adds it.")
    found = GLOSSARY[metric_word(metric)]
    if metric in GLOSSARY:
        return found
    return found._replace(title=f"{found.title}, {metric.partition('@')[2]} pairs")

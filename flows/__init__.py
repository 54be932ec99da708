r"""Bijections of identity codes, one for every key. Plain torch: no face, no password, no Lightning in here.

Every flow of this room has one interface:

* ``forward(z, key) -> (z_a, log_det)``: hide the codes ``z`` (B, dim) under ``key``;
* ``inverse(z_a, key) -> (z, log_det)``: open them again with the same key;
* ``log_det`` (B,): :math:`\log|\det J|` of the map that was just applied, so that the two add up to zero
  (of :class:`~flows.sphere.KeyedSphere`, whose inverse is approximate: of its blocks alone);
* ``key_kind``, ``"normal"`` or ``"rotation"``, and ``key_length``: which numbers the flow wants as its key. A
  ``normal`` key is a batch of vectors (B, key_length) of N(0, 1) numbers, a ``rotation`` key a batch of
  matrices (B, key_length, key_length) of the special orthogonal group, in ``key_bands`` blocks where a flow
  says so.

One key for each row of the batch, and computed in float32 (float64 when the module is double), under
autocast too: an inverse does not survive 8 bits of mantissa.

* :class:`~flows.coupling.KeyedCoupling`, normal keys, all of R^dim: learned, the published iFADIT transform.
* :class:`~flows.sphere.KeyedSphere`, normal keys, the unit sphere: learned, and undone up to an error that
  it reports.
* :class:`~flows.orthogonal.KeyedOrthogonal`, rotation keys, all of R^dim: the control, which leaves the
  manifold of real codes.
* :class:`~flows.conjugate.Conjugate`, rotation keys, the unit sphere of a subspace: fitted, people to people.
* :class:`~flows.homogeneous.LearnedConjugate`, the same with a learned flow after the whitening: closer to
  people where real codes bend.
"""

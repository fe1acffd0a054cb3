"""The gate: bounds, estimators, rates and penalties have the right value and the right gradient.

``exact`` and ``pairs`` write densities and bounds down once more and integrate them; ``cells`` says
which combinations there are, ``answers`` what the library makes of them. Every combination is
*unbiased*, *biased by design* (held against what it declares to estimate, where that is known; its bias
is measured) or *refused*. A gate that can't fail proves nothing: ``planted`` has errors that it must
catch.

    python -m tests.gate        every combination on one pair
    python -m tests.gate all    on every pair, at half the standard error: several minutes

A new part needs its instances in ``BOUNDS`` (with a reference), ``ESTIMATORS``, ``RELAXATIONS``,
``RATES`` or ``penalty_cells``, and a line in ``refusals`` or ``bias`` if some of its combinations are
refused or biased by design.
"""

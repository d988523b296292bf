"""Colours of curves, in plots and in MLflow."""

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Palette of Okabe and Ito, which colour-blind readers can distinguish."""

DISTINCT = (*OKABE_ITO, "#332288", "#882255", "#999933", "#000000")
"""Larger palette for more curves, with some of Paul Tol's muted colours,
https://sronpersonalpages.nl/~pault, and black."""

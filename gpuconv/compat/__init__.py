"""Drop-ins: the signatures of other libraries over our convolutions."""

"""Matrix products: which kernel makes each, and what is joined to them."""

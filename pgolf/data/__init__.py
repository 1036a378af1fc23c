"""Documents to shards, published data, the embedded corpus, and the audit of all of them."""

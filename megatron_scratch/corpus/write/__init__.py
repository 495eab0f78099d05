"""Documents to the indexed dataset: encode each shard, deal its documents to sides and places, join the parts."""

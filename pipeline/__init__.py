"""Stage 1: importers, preparation, media decoding, frozen backbones and the extraction job."""

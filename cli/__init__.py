"""Words in, words out: the mmrec command line, without logic of its own."""

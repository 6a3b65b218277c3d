"""Other machinery than this process that an extraction may run on."""

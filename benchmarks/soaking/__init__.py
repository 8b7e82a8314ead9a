"""The soak's parts: a rank that keeps a journal, starts and kills of ranks, checks, rounds."""

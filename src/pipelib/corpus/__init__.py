"""The text of the corpus (from the offline corpus, the user's files or the hub), and the benchmarks made from it."""

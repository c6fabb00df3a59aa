"""Where text comes from: the offline corpus, the user's files, the hub; and the benchmarks made of it."""

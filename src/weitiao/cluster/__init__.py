"""Work spread over a cluster by Ray, which is an extra: training by several workers, answers to very many rows."""

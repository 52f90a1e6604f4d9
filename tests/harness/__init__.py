"""Safe test runs under MPI: a failure is every rank's failure, and no wait is for ever."""

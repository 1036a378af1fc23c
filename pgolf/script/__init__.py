"""One script from a run's knobs and the package that trains: what a submission ships, and how many bytes it takes."""

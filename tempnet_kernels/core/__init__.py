"""What every operator stands on: registration, checks, collectives, products, the TempNet's
arithmetic. It imports nothing else of this package."""

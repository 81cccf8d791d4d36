"""Programs run from the repository; the logic is in `ejax.training`."""

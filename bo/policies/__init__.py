"""How the parts are put together: one file a policy, each a pure function of settings, history and generator."""

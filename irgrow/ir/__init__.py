"""The intermediate representation: networks as values, and the values that describe how they change."""

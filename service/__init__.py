"""The microservice: REST schema, step-level batching, Ray Serve deployment, metrics, studio."""

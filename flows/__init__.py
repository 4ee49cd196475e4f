"""The policy of trivet: order, caching and retries of the stages. The only place that knows Prefect."""

#[instrument]
#[::idem_runtime::__private::idempotent(@anchor = header("x"))]
#[debug_handler]
async fn f() {}

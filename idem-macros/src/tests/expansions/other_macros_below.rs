#[utoipa::path(post)]
#[debug_handler(state = S)]
#[foo::__private::idempotent(@anchor = header("x"), crate = foo)]
///d
#[allow(dead_code)]
async fn f(b: Json<B>) -> u8 {
    1
}

/// Delivers an event.
pub(crate) async fn deliver(
    idem: &Idempotency,
    event: Uuid,
    __a2: (Url, Body),
) -> Result<Delivered, Failed> {
    let __function: &'static ::idem_runtime::__private::Function = {
        const __IDEM_POLICY: ::idem_runtime::__private::Function = ::idem_runtime::__private::Function::new(
            ::core::concat!(::core::module_path!(), "::", "deliver"),
            "deliver",
            ::idem_runtime::__private::Policy::new(
                    ::idem_runtime::__private::Anchor::argument(),
                )
                .ttl(::core::time::Duration::from_millis(604800000)),
        );
        &__IDEM_POLICY
    };
    let __call = {
        #[allow(unused_variables)]
        let __collect = || {
            let event = &event;
            let (url, body) = &__a2;
            let mut __call = ::idem_runtime::__private::FunctionCall::new(
                ::idem_runtime::__private::engine::<Idempotency>(idem),
                __function,
            );
            __call.push(&(event));
            __call
        };
        __collect()
    };
    ::idem_runtime::__private::call::<
        Result<Delivered, Failed>,
        _,
    >(
            __call,
            ::idem_runtime::__private::never,
            move |__engine, __operation| ::idem_runtime::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: Result<Delivered, Failed> = loop {};
                    return __never;
                }
                let __args = (event, __a2);
                #[allow(unused_variables)]
                let idem = &__engine;
                let event = __args.0;
                let (url, mut body) = __args.1;
                let _ = &event;
                #[allow(unused_braces)] { body.send(url).await }
            }),
        )
        .await
}

async fn f(
    __idem: ::idem_runtime::__private::Idem<
        (),
        ::idem_runtime::__private::EngineInRouterState,
    >,
) -> ::idem_runtime::__private::Guarded<()> {
    let __policy: &'static ::idem_runtime::__private::Policy = {
        const __IDEM_POLICY: ::idem_runtime::__private::Policy = ::idem_runtime::__private::Policy::new(
                NONCE,
            )
            .in_flight(::idem_runtime::__private::InFlight::Wait(PATIENCE))
            .on_unknown(::idem_runtime::__private::OnUnknown::Refuse)
            .replay(::idem_runtime::__private::ReplayShape::new().with(shapes::brief))
            .issued();
        &__IDEM_POLICY
    };
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::probe::Fallback as _;
        ::idem_runtime::__private::probe::Of::<()>::idem_answer_is_complete();
    }
    ::idem_runtime::__private::run(
            __idem,
            __policy,
            move |__last: ()| ::idem_runtime::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: () = loop {};
                    return __never;
                }
                #[allow(unused_braces)] {}
            }),
        )
        .await
}
